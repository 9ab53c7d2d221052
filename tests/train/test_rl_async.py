"""The loop of `rl` with `max_staleness`, fed by a script: killed and resumed, every question is trained on once."""

import json
import os
import random
import signal
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_r1.checkpoint.signals import SAVED
from megatron_r1.train import rl
from megatron_r1.train.batch import Minibatch
from megatron_r1.train.feed import Service
from megatron_r1.train.learner import Learner
from megatron_r1.train.policy import Figures
from megatron_r1.types import Group, Sample
from tests.train.scripted_flow import Working
from tests.train.test_rl_async_feed import until
from tests.train.test_rl_steps import Answering, base, run  # noqa: F401

STEPS, QUESTIONS, GROUP = 4, 3, 4
AHEAD = {"max_model_len": 64, "max_tokens": 32, "dispatch": "continuous", "max_staleness": 1}


class KilledError(Exception):
    """The process is gone at this moment."""


class Fed(Answering):
    """A collector whose fleet is a script; groups have answers of their own name and weights."""

    flow: Working | None = None
    signal_at: int | None = None
    """SIGTERM comes when the weights after so many steps are asked for an answer."""

    def push(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        if self.signal_at is not None and self.signal_at < version:  # however fast the learner is
            until(lambda: self.signal_at is None)
        super().push(named_tensors, version)
        if self.flow:
            self.flow.push(version)

    def service(self, seeds: Callable[[str], list[int]]) -> Service:
        self.flow = Working(self.answer, seconds=0.02)
        self.flow.version = self._version
        return Service(self.flow, lambda question: [5, 6, 7], seeds, self.score)

    def answer(self, key: str, version: int) -> list[Sample]:
        if self.signal_at == version:
            type(self).signal_at = None
            os.kill(os.getpid(), signal.SIGTERM)
        rng = random.Random(zlib.crc32(f"{key} {version}".encode()))
        self._version, now = version, self._version
        samples = [self._sample(rng) for _ in range(GROUP)]
        self._version = now
        return samples

    def score(self, groups: Sequence[Group]) -> None:
        assert all(len(group.samples) == GROUP for group in groups)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[str]]:
    """Names of the questions that each step was trained on, the last time that it was."""
    monkeypatch.setattr(rl, "Collector", Fed)
    monkeypatch.setattr(Fed, "signal_at", None)
    steps: dict[int, list[str]] = {}
    score = Learner.score

    def noted(self: Learner, groups: Sequence[Group], step: int) -> tuple[list[Minibatch], Figures]:
        steps[step] = [group.question.id for group in groups]
        assert all(step - 1 <= sample.weight_version <= step for group in groups for sample in group.samples)
        return score(self, groups, step)

    monkeypatch.setattr(Learner, "score", noted)
    return steps


def go(base: Path, output: Path, **changes: Any) -> dict[str, Any]:  # noqa: F811
    checkpoint = {"every": 1, "keep": 10}
    return run(base, output, **{"rollout": AHEAD, "checkpoint": checkpoint, "loss": {"type": "grpo"}, **changes})


def each_once(trained: dict[int, list[str]]) -> None:
    assert list(trained) == list(range(STEPS))
    names = [name for step in trained.values() for name in step]
    assert sorted(names) == sorted(f"chain_sum-{position}" for position in range(STEPS * QUESTIONS))


def steps(output: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "step"]


def test_saved_by_a_signal_and_killed_it_skips_and_repeats_no_question(
    trained: dict[int, list[str]],
    base: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Fed, "signal_at", 1)
    with pytest.raises(SystemExit) as ended:
        go(base, tmp_path)
    assert ended.value.code == SAVED
    score = Learner.score

    def killed(self: Learner, groups: Sequence[Group], step: int) -> tuple[list[Minibatch], Figures]:
        if step == 2:
            raise KilledError
        return score(self, groups, step)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "score", killed)
        with pytest.raises(KilledError):
            go(base, tmp_path)
    summary = go(base, tmp_path)
    each_once(trained)
    assert summary["questions_drawn"] == STEPS * QUESTIONS
    rows = steps(tmp_path)
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert all(
        row["staleness/0"] + row.get("staleness/1", 0) == pytest.approx(1) for row in rows if "staleness/0" in row
    )
    assert {row["fleet_idle"] for row in rows} == {0.25}
    assert all(0 <= row["learner_idle"] <= 1 for row in rows)
    assert all(row["importance_ratio"] > 0 and row["mismatch_kl"] >= 0 for row in rows)
    last = torch.load(tmp_path / "checkpoints/step_00000004/common.pt", weights_only=True)
    assert last["figures"]["in_flight"]["ledger"]["live"] == []


def test_a_synchronous_run_may_go_on_ahead(
    trained: dict[int, list[str]],
    base: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two steps without, two with; the questions go on where they were."""
    with monkeypatch.context() as patch:
        patch.setattr(Fed, "sent", signal.SIGTERM)
        with pytest.raises(SystemExit):
            go(base, tmp_path, rollout={"max_model_len": 64, "max_tokens": 32})
    assert list(trained) == [0, 1]
    go(base, tmp_path)
    each_once(trained)
