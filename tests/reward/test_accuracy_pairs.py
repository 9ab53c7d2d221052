r"""Answers as models write them, against references as data sets hold them: what is right is paid, what is wrong not.

Of a row of `data/math_pairs.jsonl`, `right`, `wrong`, `unfinished` and `refused` stand inside `<answer>`, `prose`
follows `</think>` and is right. `unfinished` has the right value, but leaves a number to be worked out: paying for
`2^{10}` would pay for repeating "Compute 2^{10}", and for leaving out the last step. `refused` is right and not paid,
each with what is not understood.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config import component
from megatron_r1.types import Group, Question, Sample

ROWS: list[dict[str, Any]] = [
    json.loads(line) for line in (Path(__file__).parent / "data/math_pairs.jsonl").read_text("utf-8").splitlines()
]


def pairs(*fields: str) -> list[tuple[str, str]]:
    return [(row["reference"], answer) for row in ROWS for field in fields for answer in row.get(field, [])]


def score(reference: str, answer: str, wrap: str = "<answer>", **config: str) -> float | None:
    reward = component.build("reward", {"type": "accuracy", **config})
    text = f"<think>thought</think> {wrap}{answer}{wrap.replace('<', '</')}"
    group = Group(Question("0", "math", "q", reference), [], [Sample([], [], text, True, 0)])
    result: list[float | None] = reward(group)
    return result[0]


def unexpected(expected: float, *fields: str) -> Iterator[tuple[str, str]]:
    return ((reference, answer) for reference, answer in pairs(*fields) if score(reference, answer) != expected)


def test_right_answers_are_paid() -> None:
    assert list(unexpected(1.0, "right")) == []


def test_right_answers_behind_reasoning_are_paid() -> None:
    wrong = [pair for pair in pairs("prose") if score(*pair, wrap="", answer_in="after_think") != 1.0]
    assert wrong == []


def test_wrong_answers_are_not_paid() -> None:
    assert list(unexpected(0.0, "wrong")) == []


def test_unfinished_answers_are_not_paid() -> None:
    assert list(unexpected(0.0, "unfinished")) == []


def test_few_right_answers_are_refused() -> None:
    assert list(unexpected(0.0, "refused")) == [], "now understood: make it `right`"
    assert len(pairs("refused")) <= 0.02 * len(pairs("right", "prose", "refused"))


@pytest.mark.parametrize(("fields", "least"), [(("right", "prose", "refused"), 1000), (("wrong",), 400)])
def test_there_are_enough(fields: tuple[str, ...], least: int) -> None:
    assert len(set(pairs(*fields))) >= least
