"""A push that fails is made again from the first tensor, and engines that came back empty are filled, then asked."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from megatron_r1.config.runs import RLConfig
from megatron_r1.config.sections import ParallelSection
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.model.mapping import Export
from megatron_r1.model.parallel import initialize
from megatron_r1.model.safetensors_file import Spec
from megatron_r1.report.run import Report
from megatron_r1.rollout.engine import PREFLIGHT
from megatron_r1.rollout.fan_out import TransferError
from megatron_r1.rollout.fleet import Fleet
from megatron_r1.rollout.server import WeightsNeededError
from megatron_r1.train.collector import Collector
from megatron_r1.train.interruption import Interruptions
from megatron_r1.types import Group, Question
from megatron_r1.weight_sync.named_tensors import NamedTensors
from tests.train.test_rl_rollouts import config

NAMES = ["a", "b", "c"]


class Exported:
    """What a model exports, collected anew each time."""

    def __init__(self, names: Sequence[str] = NAMES) -> None:
        self.names, self.passes = names, 0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.passes += 1
        for name in self.names:
            yield name, torch.ones(2)

    def specs(self) -> dict[str, Spec]:
        return {name: Spec(torch.float32, (2,)) for name in self.names}

    def spread_out(self) -> "Exported":
        return self

    def of_each_stage(self) -> "Exported":
        return Exported(NAMES[:1])


class Failing:
    """Fails at its second tensor, as often as it is told."""

    transport = "disk"

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.pushed: list[tuple[int, list[str]]] = []

    def push(self, tensors: NamedTensors, version: int) -> float:
        got = []
        for name, _ in tensors:
            got.append(name)
            if self.failures and len(got) == 2:
                self.failures -= 1
                raise TransferError(f"{name} did not arrive")
        self.pushed.append((version, got))
        return 0.1

    def close(self) -> None: ...


class Said:
    """A report that keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        yield

    def message(self, text: str) -> None:
        self.messages.append(text)


class Pushing(Collector):
    """Without a fleet: engines that have no weights are a number."""

    empty = 0

    def __init__(self, run: RLConfig, failures: int = 0) -> None:
        self.said, self.sync = Said(), Failing(failures)
        super().__init__(run, cast(Tokenizer, None), cast(Report, self.said), Interruptions())
        self._sync = self.sync
        self._fleet = cast(Fleet, SimpleNamespace(updated=0.0))

    def _collect(self, questions: Sequence[Question], n: int, seed: int, temperature: float | None) -> list[Group]:
        if self.empty:
            self.empty -= 1
            raise WeightsNeededError("engine-0 has come back without weights")
        return [Group(question, [1], []) for question in questions]


@pytest.fixture(autouse=True)
def _one_rank() -> None:
    initialize(ParallelSection(), seed=0)


def run(retries: int, sleep: bool = False) -> RLConfig:
    rollout = {"max_model_len": 64, "max_tokens": 32, "transport": "disk", "transfer_retries": retries, "sleep": sleep}
    return config(rollout=rollout)


def export(made: Exported) -> Export:
    return cast(Export, made)


def test_a_transfer_that_fails_is_repeated_whole() -> None:
    """After some tensors ahead, and with the plan said once."""
    collector, made = Pushing(run(retries=1), failures=1), Exported()
    collector.push(export(made), version=0)
    assert collector.sync.pushed == [(PREFLIGHT, ["a"]), (PREFLIGHT, ["a"]), (0, NAMES)]
    assert made.passes == 2
    collector.push(export(made), version=1)
    assert collector.sync.pushed[3:] == [(1, NAMES)]
    plan, again = collector.said.messages
    assert plan.startswith("weights reach the engines by disk: 3 tensors")
    assert again == "sent again: b did not arrive"


def test_retries_are_counted() -> None:
    collector, made = Pushing(run(retries=2), failures=3), Exported()
    with pytest.raises(TransferError, match="b did not arrive"):
        collector.push(export(made), version=0)
    assert made.passes == 3


def test_engines_without_weights_are_filled_and_asked_again() -> None:
    """With the weights that they had: the policy has not changed since."""
    collector, made = Pushing(run(retries=1)), Exported()
    collector.push(export(made), version=7)
    collector.empty = 2
    question = cast(Question, "1 + 1")
    assert [group.question for group in collector.collect([question], n=1, seed=0)] == [question]
    assert collector.sync.pushed[2:] == [(7, NAMES)] * 3
    assert len([message for message in collector.said.messages if "weights 7 are sent again" in message]) == 2


@pytest.mark.parametrize("sleep", [True, False])
def test_engines_sleep_while_the_learner_trains_and_have_room_when_they_wake(
    monkeypatch: pytest.MonkeyPatch, sleep: bool
) -> None:
    """What the learner has reserved and does not use goes back to the GPU before a push, which wakes them."""
    happened: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: happened.append("room"))
    collector = Pushing(run(retries=0, sleep=sleep))
    collector._fleet = cast(Fleet, SimpleNamespace(updated=0.0, sleep=lambda: happened.append("asleep")))
    push = collector.sync.push
    monkeypatch.setattr(collector.sync, "push", lambda *given: [happened.append("push"), push(*given)][1])
    collector.push(export(Exported()), version=0)
    collector.rest()
    pushes = ["push"] * 3  # two of them ahead
    assert happened == (["room", *pushes, "asleep"] if sleep else pushes)
