from collections import Counter

import pytest

from megatron_r1.report.samples import sample_rows, shown
from megatron_r1.types import Group, Question, Sample


def test_tokens_are_kept_where_their_texts_are_asked_for() -> None:
    sample = Sample([5, 6], [-0.12345678, -0.2], "ab", True, 0)
    question = Question("q", "sums", "User: 1 + 1? Assistant:", "2", {"text": "1 + 1?"})
    (plain,) = sample_rows(0, [Group(question, [1], [sample])], "train")
    assert plain["question"] == "1 + 1?"
    assert "pieces" not in plain["responses"][0]
    (row,) = sample_rows(0, [Group(question, [1], [sample])], "train", lambda ids: [chr(92 + i) for i in ids])
    kept = row["responses"][0]
    assert (kept["pieces"], kept["engine_logprobs"], kept["trainer_logprobs"]) == (["a", "b"], [-0.1234568, -0.2], None)
    sample.trainer_logprobs = [-0.25, -0.5]
    (row,) = sample_rows(0, [Group(question, [1], [sample])], "train", lambda ids: ["", ""])
    assert row["responses"][0]["trainer_logprobs"] == [-0.25, -0.5]


def asked(*names: str) -> list[Group]:
    return [Group(Question(f"{name}-{number}", "task", "?", ""), [1], []) for number, name in enumerate(names)]


def test_a_member_of_a_mixture_is_the_task() -> None:
    question = Question("helpful-3", "general", "?", "", {"member": "helpful"})
    (row,) = sample_rows(0, [Group(question, [1], [])], "train")
    assert row["task"] == "helpful"


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_the_tasks_of_a_rollout_take_turns(stride: int) -> None:
    """Whatever their order, and also in every second, fourth and eighth step, which is what a browser may keep."""
    rollouts = [asked("sums", "sums", "chat", "safe-ty"), asked("chat", "safe-ty", "sums", "chat")]
    kept = [rollouts[step % 2][shown(rollouts[step % 2], step)] for step in range(0, 300 * stride, stride)]
    counts = Counter(group.question.id[:-2] for group in kept)
    assert counts.keys() == {"sums", "chat", "safe-ty"}
    assert min(counts.values()) > 60
    if stride == 1:
        assert set(counts.values()) == {100}
    assert shown(asked("sums", "sums"), 7) == 0
