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
        assert not prompt.endswith(" ")
        assert prompt.count("q") == TEMPLATES[name].count("q")


def test_chat_of_r1_begins_inside_the_reasoning_and_leaves_the_first_token_to_the_tokenizer() -> None:
    assert render("r1_chat", "1 + 1?") == "<｜User｜>1 + 1?<｜Assistant｜><think>\n"
    assert render("r1_chat_boxed", "1 + 1?") == (
        "<｜User｜>1 + 1?\nPlease reason step by step, and put your final answer within \\boxed{}."
        "<｜Assistant｜><think>\n"
    )


def test_programs_are_asked_for_in_fences() -> None:
    prompt = render("r1_zero_code", "Sort.\n\nassert f([2, 1]) == [1, 2]")
    assert prompt.endswith("User: Sort.\n\nassert f([2, 1]) == [1, 2]\nAssistant:")
    assert "```" in prompt
    assert "<answer>" in prompt


def test_a_template_given_by_its_text() -> None:
    assert render("Q: {question}\nA {json}:", "1 + 1?") == "Q: 1 + 1?\nA {json}:"


def test_neither_name_nor_text() -> None:
    with pytest.raises(ConfigError, match="did you mean 'r1_zero'"):
        render("r1_zer", "q")
