"""Sampling ahead, down to the processes of engines by script: weights that nobody has kept, checkpoints."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_r1.config.runs import RLConfig
from megatron_r1.config.sections import ParallelSection
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.model.parallel import initialize
from megatron_r1.report.run import Report
from megatron_r1.seeds import stream_seed
from megatron_r1.train.ahead import Ahead
from megatron_r1.train.collector import Collector
from megatron_r1.train.interruption import Interruptions
from megatron_r1.train.rollouts import IN_FLIGHT
from megatron_r1.types import Group
from megatron_r1.weight_sync.named_tensors import NamedTensors
from tests.rollout.scripted_server import response
from tests.rollout.test_engine_faults import ScriptedFleet, opened, wait_for  # noqa: F401
from tests.rollout.test_passed_weights import send
from tests.train.test_collector_push import Exported, Said, export
from tests.train.test_rl_async_feed import AHEAD, through_a_file
from tests.train.test_rl_rollouts import config, numbers

QUESTIONS, GROUP = 3, 2


class Passing:
    """A transport that keeps nothing."""

    transport = "ipc"

    def __init__(self, fleet: ScriptedFleet) -> None:
        self.fleet = fleet
        self.pushed: list[int] = []

    def push(self, tensors: NamedTensors, version: int) -> float:
        assert len(list(tensors)) == 3
        self.fleet.pass_weights(lambda members: send(members, self.fleet.folder, version), version)
        self.pushed.append(version)
        return 0.1

    def close(self) -> None: ...


class Asking(Collector):
    """With a fleet that is there, and answers that are worth as many points as they have tokens."""

    def __init__(self, run: RLConfig, fleet: ScriptedFleet) -> None:
        self.said, self.sync = Said(), Passing(fleet)
        tokenizer = SimpleNamespace(encode_prompt=lambda prompt: [1, len(prompt)])
        super().__init__(run, cast(Tokenizer, tokenizer), cast(Report, self.said), Interruptions())
        self._fleet, self._sync, self._tried = fleet, self.sync, True
        self.judges = threading.Event()
        """While it is not set only groups are judged that the first weights may begin."""
        self.judges.set()

    def _open(self) -> None: ...

    def _score(self, groups: Sequence[Group]) -> None:
        assert max(numbers(groups)) < 2 * QUESTIONS or self.judges.wait(240)
        for sample in (sample for group in groups for sample in group.samples):
            sample.reward = float(len(sample.tokens))


@pytest.fixture(autouse=True)
def _one_rank() -> None:
    initialize(ParallelSection(), seed=0)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def settings(**changes: Any) -> RLConfig:
    return config(questions=QUESTIONS, group_size=GROUP, rollout=AHEAD | {"max_staleness": 1}, **changes)


def answers(run: RLConfig, numbers: Sequence[int], version: int) -> list[list[list[int]]]:
    """Tokens of the samples of some questions, all by these weights."""
    keys = [f"data:{number}" for number in numbers]
    seeds = [[stream_seed("rollout", run.seed, key, sample) for sample in range(GROUP)] for key in keys]
    return [[response(seed, version, 50)["tokens"] for seed in group] for group in seeds]


def tokens(groups: Sequence[Group]) -> list[list[list[int]]]:
    return [[sample.tokens for sample in group.samples] for group in groups]


NOTHING = {"kind": "slow", "after": -1}
"""The fault of a load that goes well."""


def one_life(then: dict[str, Any]) -> dict[str, Any]:
    """An engine that has got three groups, all it has room for, dies of the third with none of them answered."""
    die = {"kind": "die", "after": 0, "then": then}
    return {"kind": "slow", "after": -1, "seconds": 600.0, "times": 2, "then": die}


def test_the_only_engine_dies_and_gets_its_weights_again(
    opened: Any,  # noqa: F811
    stack: ExitStack,
) -> None:
    """Twice while the learner waits: it gets the version that it had, and is asked again for what it was asked for."""
    run = settings()
    fleet = opened(engines=1, dispatch="continuous")
    collector, ahead = Asking(run, fleet), Ahead(run, frozenset())
    stack.enter_context(collector)
    collector.push(export(Exported()), version=0)
    fleet.breaks(0, **one_life(NOTHING | {"then": one_life(NOTHING)}))
    groups = ahead.sample(collector, 0).groups
    assert collector.sync.pushed == [0, 0, 0]
    assert tokens(groups) == answers(run, numbers(groups), 0)
    assert all(sample.reward == len(sample.tokens) for group in groups for sample in group.samples)
    again = "weights 0 are sent again: no engine is left that has weights"
    assert [message for message in collector.said.messages if "sent again" in message] == [again, again]
    collector.push(export(Exported()), version=1)
    later = ahead.sample(collector, 1).groups
    assert not set(numbers(groups)) & set(numbers(later))
    assert collector.sync.pushed == [0, 0, 0, 1]
    assert fleet.figures()["engines_lost"] == 2


def test_what_was_complete_and_not_judged_is_judged_after_a_resume(opened: Any, stack: ExitStack) -> None:  # noqa: F811
    """Groups are complete while nobody judges those that the second weights have begun: none of them is asked again."""
    run, made = settings(), Exported()
    fleet = opened(engines=1, dispatch="continuous")
    collector, ahead = Asking(run, fleet), Ahead(run, frozenset())
    with collector:
        collector.judges.clear()
        collector.push(export(made), version=0)
        first = ahead.sample(collector, 0).groups
        collector.push(export(made), version=1)

        def complete() -> dict[str, set[str]]:
            """Groups in the ledger whose samples are all there, judged and not."""
            state = ahead.kept()[IN_FLIGHT]
            return {
                "judged": set(state["groups"]),
                "begun": {key for key, had in state["begun"].items() if len(had) == GROUP},
            }

        wait_for(lambda: len(set.union(*complete().values())) == 2 * QUESTIONS)
        kept, before = through_a_file(ahead.kept()), complete()
        collector.judges.set()
    assert len(before["begun"]) >= QUESTIONS
    requests = len(fleet.requests(0))
    collector, ahead = Asking(run, fleet), Ahead(run, frozenset())
    stack.enter_context(collector)
    ahead.restore(kept)
    collector.push(export(made), version=1)
    groups = ahead.sample(collector, 1).groups
    assert len(fleet.requests(0)) == requests
    collector.push(export(made), version=2)
    groups += ahead.sample(collector, 2).groups
    assert not set(numbers(first)) & set(numbers(groups))
    names = {f"data:{number}" for number in numbers(groups)}
    assert len(names & (before["begun"] | before["judged"])) == len(names) == 2 * QUESTIONS
    assert all(sample.reward == len(sample.tokens) for group in groups for sample in group.samples)
