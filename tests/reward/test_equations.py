import pytest

from megatron_r1.reward.equations import Equations, steps
from megatron_r1.types import Group, Question, Sample


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3+4=7, then 7-9=-2", [(5, 1.0), (18, 1.0)]),
        ("3+4=8", [(5, 0.0)]),
        ("-3-4=-7 and -3 - -4 = 1", [(7, 1.0), (23, 1.0)]),
        ("6*7=42. 7/2=3.5 7/2=3 7/0=0", [(6, 1.0), (15, 1.0), (21, 0.0), (27, 0.0)]),
        ("0.1+0.2=0.3", [(11, 1.0)]),
        ("x+4=7, 1+2+3=6, a1+2=3", []),
        ("no equation", []),
        ("2+2=4*1", []),
    ],
)
def test_steps(text: str, expected: list[tuple[int, float]]) -> None:
    assert list(steps(text)) == expected


def test_scores_and_marks() -> None:
    texts = ["3+4=7, 7+1=9", "it is 8"]
    samples = [Sample([1], [0.0], text, True, 0) for text in texts]
    reward = Equations(Equations.Config())
    assert reward(Group(Question("q", "sums", "", "8"), [1], samples)) == [0.5, None]
    assert samples[0].step_marks == [(5, 1.0), (12, 0.0)]
    assert samples[1].step_marks == []
