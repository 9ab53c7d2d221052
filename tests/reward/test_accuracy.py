import logging

import pytest

from megatron_r1.config import component
from megatron_r1.errors import ConfigError
from megatron_r1.types import Group, Question, Sample

SET_IN_TWO_BOXES = r"\boxed{1} and \boxed{2}"


def scores(reference: str, *texts: str, **config: object) -> list[float | None]:
    reward = component.build("reward", {"type": "accuracy", **config})
    samples = [Sample([], [], text, True, 0) for text in texts]
    result: list[float | None] = reward(Group(Question("0", "none", "q <think>\n", reference), [], samples))
    return result


def judged(reference: str, *answers: str, **config: object) -> list[float | None]:
    return scores(reference, *(f"a</think> <answer>{answer}</answer>" for answer in answers), **config)


@pytest.mark.parametrize(
    ("reference", "right", "wrong"),
    [
        ("42", ["42", "$42$", r"\boxed{42}", "42.0", "+42", "x = 42", "40 + 2 = 42", r"\frac{84}{2}"], ["41", "x"]),
        ("42", ["The answer is 42.", "There are 42 apples.", "**42**", "42 cm", r"42\text{ cm}^2", "#### 42"], [""]),
        ("42", ["a_{10} = 42", "f(2) = 42", "AB + BC = 42", "= 42"], ["4x = 42", "40 = 42", "x + 1 = 42", "42 = x"]),
        ("42", ["４２", "$42", r"42^\circ", r"4.2 \times 10^{1}", "答案是42", "so it is 42"], ["424"]),
        (r"\frac{1}{2}", ["1/2", "0.5", r"$\frac{2}{4}$", r"\frac12", "50%", "1:2"], ["2", r"\frac{1}{3}", "0.51"]),
        ("1/3", ["0.333333", r"\frac{1}{3} \approx 0.33"], ["0.33", "0.3334"]),
        ("50%", ["50", r"50\%", "0.5", "50 percent"], ["5%", "500"]),
        ("1{,}000", ["1000", "1,000", r"1\,000", "10^3"], ["1", "100"]),
        ("0.0000001", ["1e-7", "10^{-7}"], ["0", "0.0000002"]),
        (r"$x^2 + 2x + 1$", ["$(x+1)^2$", "f(x)=(x+1)^2"], ["$x^2$", "x^2+2x+2"]),
        (r"2\sqrt{3}", [r"\sqrt{12}", "2*sqrt(3)", "3.4641016"], ["3.46", r"\sqrt{13}"]),
        (r"\frac{\pi}{4}", [r"\pi/4", "pi/4", "π/4"], ["45", r"\frac{\pi}{3}"]),
        ("1, 2", ["2, 1", r"\{1,2\}", "x=1 or x=2", SET_IN_TWO_BOXES, "They are $1$ and $2$."], ["1", "1,2,3"]),
        ("(1,2)", ["(1, 2)", "1,2"], ["2,1", "[1,2]", "(1,2]"]),
        (r"(-\infty,2)", ["x<2", r"(-\infty, 2)", r"x \in (-∞,2)"], [r"x \le 2", r"(-\infty,3)"]),
        ("x=5", ["5", "x=5", "x-5=0"], ["y=5", "x=6"]),
        ("y=2x+1", ["2x-y+1=0", "y=2x+1"], ["y=2x", "y=y"]),
        (r"\text{Evelyn}", ["Evelyn", r"\boxed{\text{Evelyn}}", "The answer is Evelyn."], ["Evelny", "Evelyn or Bob"]),
        (r"\text{no solution}", ["no solution", r"\boxed{\text{No solution}}"], ["solution", "one solution"]),
        (r"0.\overline{3}", ["1/3", r"0.\overline{3}", "0.333333"], ["0.3", r"0.\overline{4}"]),
        (r"\text{(C)}", ["C", "(C)"], ["D", "C or D"]),
        (r"\emptyset", [r"\varnothing", r"\{\}"], ["0"]),
        (r"[0,\infty)", [r"[0, +\infty)", r"x \ge 0"], [r"(0,\infty)", "[0,5)"]),
        (r"\$36", ["36", "$36", "36 dollars"], ["37 dollars"]),
        (r"We get 1, then 2, so \boxed{3}.", ["3"], ["1", "2"]),
        (
            r"\begin{pmatrix}1\\2\end{pmatrix}",
            [r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}"],
            [r"\begin{pmatrix}2\\1\end{pmatrix}"],
        ),
    ],
)
def test_right_and_wrong(reference: str, right: list[str], wrong: list[str]) -> None:
    assert dict(zip(right, judged(reference, *right), strict=True)) == dict.fromkeys(right, 1.0)
    assert dict(zip(wrong, judged(reference, *wrong), strict=True)) == dict.fromkeys(wrong, 0.0)


def test_a_reference_that_is_no_mathematics_does_not_apply(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert judged("the red and the blue one", "the red and the blue one", "5") == [None, None]
    assert [record.message.count("gets no accuracy") for record in caplog.records] == [1]


def test_where_the_answer_stands() -> None:
    texts = ["a</think> <answer>5</answer>", "a</think> So it is \\boxed{5}.", "5", "<answer>5</answer> a</think>"]
    assert scores("5", *texts) == [1.0, 0.0, 0.0, 0.0]
    assert scores("5", *texts[1:3], answer_in="after_think") == [1.0, 0.0]


def test_a_box_on_request() -> None:
    assert judged("5", "5", r"\boxed{5}", "5", require_boxed=True) == [0.0, 1.0, 0.0]
    assert judged(r"\text{east}", "east", r"\boxed{east}", require_boxed=True) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("text", "ours", "theirs"),
    [
        (r"<think>a</think> \boxed{5}", 1.0, 1.0),
        (r"<think>a</think> \boxed{4}", 0.0, 0.0),
        (r"<think>so \boxed{5}</think> I do not know", 0.0, 1.0),
        (r"<think>a</think> \boxed{2+3}", 0.0, 1.0),
        (r"<think>a</think> \boxed{x=4=5}", 0.0, 1.0),
        ("<think>a</think> The answer is 5.", 1.0, 0.0),
    ],
)
def test_as_open_r1_scores(text: str, ours: float, theirs: float) -> None:
    group = Group(Question("0", "none", "q", "5"), [], [Sample([], [], text, True, 0)])
    strict = component.build("reward", {"type": "accuracy", "answer_in": "after_think"})
    compatible = component.build("reward", {"type": "accuracy", "compatible": "open-r1"})
    assert (strict(group), compatible(group)) == ([ours], [theirs])


def test_open_r1_leaves_out_a_reference_it_cannot_parse() -> None:
    assert scores("the red one", r"\boxed{5}", compatible="open-r1") == [None]


def test_unknown_compatibility() -> None:
    with pytest.raises(ConfigError, match=r"compatible: .*'open-r1'"):
        judged("42", "42", compatible="openr1")
