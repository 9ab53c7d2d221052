import pytest

from megatron_r1.reward.code_format import CodeFormat
from tests.reward.coding import answer, question, score

BLOCK = "```python\nx\n```"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (answer("x"), 1.0),
        (answer("x", "py"), 1.0),
        (answer("x", ""), 0.0),
        (answer("x", "cpp"), 0.0),
        (f"<think>a</think><answer>Here:\n{BLOCK}\nDone.</answer>", 1.0),
        (f"<think>{BLOCK}</think><answer>x</answer>", 0.0),
        (f"<think>a</think><answer>x</answer>\n{BLOCK}", 0.0),
        (f"{BLOCK}", 0.0),
        (answer("x") + "more", 0.0),
        ("<think>a</think><answer>```python\nx</answer>", 0.0),
    ],
)
def test_python(text: str, expected: float) -> None:
    assert score(CodeFormat(CodeFormat.Config()), question(asserts=["x"]), text) == expected


def test_language_of_the_tests_or_the_section() -> None:
    plain, rust = CodeFormat(CodeFormat.Config()), CodeFormat(CodeFormat.Config(language="rust"))
    assert score(plain, question(language="cpp", stdin=[]), answer("x", "c++")) == 1.0
    assert score(plain, question(language="cpp", stdin=[]), answer("x")) == 0.0
    assert score(rust, question(language="cpp", stdin=[]), answer("x", "rust")) == 1.0


def test_after_the_reasoning() -> None:
    free = CodeFormat(CodeFormat.Config(answer_in="after_think"))
    assert score(free, question(asserts=["x"]), f"<think>a</think>\n{BLOCK}") == 1.0
    assert score(free, question(asserts=["x"]), f"<think>{BLOCK}</think> x") == 0.0
