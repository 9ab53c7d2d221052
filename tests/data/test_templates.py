import pytest

from megatron_r1.data.templates import TEMPLATES, render
from megatron_r1.errors import ConfigError


def test_r1_zero_states_the_form_and_ends_where_the_assistant_speaks() -> None:
    prompt = render("r1_zero", "What is 2 {+} 3")
    assert prompt.endswith("User: What is 2 {+} 3. Assistant:")
    assert "\n" not in prompt
    for tag in ("<think>", "</think>", "<answer>", "</answer>"):
        assert tag in prompt


def test_no_template_ends_with_a_space() -> None:
    for name in TEMPLATES:
        prompt = render(name, "q")
        assert prompt == prompt.rstrip()


def test_a_template_given_by_its_text() -> None:
    assert render("Q: {question}\nA {json}:", "1 + 1?") == "Q: 1 + 1?\nA {json}:"


def test_neither_name_nor_text() -> None:
    with pytest.raises(ConfigError, match="did you mean 'r1_zero'"):
        render("r1_zer", "q")
