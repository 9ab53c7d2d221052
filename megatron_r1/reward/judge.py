"""The judge: every reward of every sample, and their weighted sum.

A group is scored as soon as it is handed in, while others are still being generated. Rewards that only look at a
text run here. Those that run a verifier on what the policy wrote (`isolated`) go to worker processes; one that hangs
or kills its worker scores 0, and no other sample suffers for it. Those that ask a server have their requests in flight.
"""

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from statistics import fmean
from types import TracebackType
from typing import Self

from megatron_r1.config import component
from megatron_r1.config.section import Component
from megatron_r1.errors import ConfigError, nearest
from megatron_r1.reward.base import Reward, Scores
from megatron_r1.reward.verifiers import Verifiers
from megatron_r1.reward.worker import Call, Verdict
from megatron_r1.types import Group, Question, Sample

_CHUNK = 16
"""Samples sent to a worker at once: messages stay few, and workers share a group evenly."""

log = logging.getLogger(__name__)


class Judge:
    """Fills `sample.rewards`, `sample.correct` and `sample.reward`; a context manager.

    Any thread may have groups scored, each in a `Sitting` of its own.

    Args:
        rewards: the run file's [rewards]: name -> section with `type`, `weight` (1.0) and the reward's own keys.
        tasks: sections of the tasks whose verifiers will be needed; workers load them before they start.
        workers: processes for isolated rewards.
        timeout: seconds that one verification may take, unless its reward has a `deadline` of its own.

    Raises:
        ConfigError: unknown reward or key, or a weight that is not a number.
    """

    def __init__(
        self,
        rewards: dict[str, Component],
        tasks: Sequence[Component] = (),
        workers: int = 2,
        timeout: float = 10.0,
    ) -> None:
        self.weights = {name: _weight(name, section) for name, section in rewards.items()}
        sections = {name: {k: v for k, v in section.items() if k != "weight"} for name, section in rewards.items()}
        self._rewards = {name: _build(name, section) for name, section in sections.items()}
        self._isolated = {name: s for name, s in sections.items() if self._rewards[name].isolated}
        self._limits = {name: self._rewards[name].deadline or timeout for name in self._isolated}
        self._tasks = list(tasks)
        self._workers = workers
        self._verifiers: Verifiers | None = None
        self._starting: list[Future[list[Verdict]]] = []
        self._lock = threading.RLock()
        """Rewards that run here are called by one thread at a time."""
        self.counters: Counter[str] = Counter(verifier_timeouts=0, verifier_crashes=0)
        """Verifications that ran past the time limit, or died or raised: `failure_score` of the reward, mostly 0. Then
        what each reward counts itself, under `<reward>_<name>`."""
        self._count()

    def __enter__(self) -> Self:
        if self._isolated:
            self._verifiers = Verifiers(self._isolated, self._tasks, self._workers, self._limits)
            self._starting = [self._verifiers.submit([]) for _ in range(self._workers)]
        for name, reward in self._rewards.items():
            if name not in self._isolated:
                reward.prepare()
        return self

    def wait_until_ready(self) -> None:
        """Wait for the worker processes, which start by themselves.

        Raises:
            UserError: what a reward or a task needs is missing; says what.
        """
        for started in self._starting:
            started.result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._verifiers is not None:
            self._verifiers.close()
            self._verifiers = None

    def __call__(self, groups: Sequence[Group]) -> None:
        """Score all samples of `groups` in place: a sitting from beginning to end."""
        sitting = self.sitting()
        for group in groups:
            sitting.submit(group)
        sitting.finish()

    def sitting(self) -> "Sitting":
        """Groups that will be scored together."""
        return Sitting(self)

    def _begin(self, group: Group) -> "_Submitted":
        names = self._applicable(group.question)
        for sample in group.samples:
            sample.rewards = dict.fromkeys(self._rewards)
        # Workers verify while the other rewards are computed here.
        calls = list(_chunks(group, [name for name in names if name in self._isolated]))
        pending = [(chunk, self._send(chunk)) for chunk in calls]
        here = [name for name in names if name not in self._isolated and not self._rewards[name].needs_correctness]
        begun = [(name, self._rewards[name].begin(group)) for name in here]
        return _Submitted(group, names, pending, begun)

    def _end(self, submitted: "Sequence[_Submitted]") -> None:
        for part in submitted:
            for chunk, future in part.pending:
                self._collect(chunk, future.result())
            for name, scores in part.begun:
                self._store(name, part.group.samples, scores())
            for name in part.names:
                if self._rewards[name].needs_correctness:
                    self._store(name, part.group.samples, self._rewards[name](part.group))
            stand_ins = self._stand_ins(part.group)
            for sample in part.group.samples:
                sample.reward = self._weighted_sum(stand_ins | _given(sample))
        self._count()

    def _count(self) -> None:
        for name, reward in self._rewards.items():
            for what, count in reward.counters.items():
                self.counters[f"{name}_{what}"] = count

    def _applicable(self, question: Question) -> list[str]:
        """The rewards that score this question, in the order of [rewards]."""
        if question.rewards is None:
            return list(self._rewards)
        for name in question.rewards:
            if name not in self._rewards:
                raise ConfigError(
                    f"question {question.id} is scored by {name!r}{nearest(name, self._rewards)}, which [rewards] does "
                    f"not have (it has {', '.join(self._rewards)}); set the task's `rewards` to names of [rewards]"
                )
        return [name for name in self._rewards if name in question.rewards]

    def _stand_ins(self, group: Group) -> dict[str, float]:
        """What counts where a reward failed: see `Reward.may_fail`."""
        scores = [_given(sample) for sample in group.samples]
        failing = [name for name, reward in self._rewards.items() if reward.may_fail]
        given = {name: [score[name] for score in scores if name in score] for name in failing}
        return {name: fmean(values) for name, values in given.items() if values}

    def _weighted_sum(self, scores: dict[str, float]) -> float:
        return sum(weight * scores[name] for name, weight in self.weights.items() if name in scores)

    def _send(self, calls: list[Call]) -> "Future[list[Verdict]]":
        assert self._verifiers is not None, "a judge with isolated rewards works inside its `with` block"
        return self._verifiers.submit(calls)

    def _collect(self, calls: list[Call], verdicts: list[Verdict]) -> None:
        samples = [(name, group.question, sample) for name, group in calls for sample in group.samples]
        for (name, question, sample), verdict in zip(samples, verdicts, strict=True):
            if verdict.error is not None:
                self.counters["verifier_timeouts" if verdict.timed_out else "verifier_crashes"] += 1
                failed = self._rewards[name].failure_score
                log.warning("reward %r of question %s scores %g: %s", name, question.id, failed, verdict.error)
                self._store(name, [sample], [failed])
            else:
                self._store(name, [sample], [verdict.score])

    def _store(self, name: str, samples: Sequence[Sample], values: Sequence[float | None]) -> None:
        if len(values) != len(samples):
            raise ConfigError(f"reward {name!r} returned {len(values)} scores for {len(samples)} samples")
        for sample, value in zip(samples, values, strict=True):
            if value is not None and not math.isfinite(value):
                raise ConfigError(f"reward {name!r} returned {value}; a score is a finite number or None")
            sample.rewards[name] = value
            if value is not None and self._rewards[name].judges_correctness:
                sample.correct = value >= 1.0 and sample.correct is not False


class Sitting:
    """Groups that are scored together, whatever other threads have scored meanwhile.

    Args:
        judge: scores them.
    """

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._submitted: list[_Submitted] = []

    def submit(self, group: Group) -> None:
        """Begin to score a complete group.

        Raises:
            ConfigError: its question names a reward that the run does not have.
        """
        with self._judge._lock:
            self._submitted.append(self._judge._begin(group))

    def finish(self) -> None:
        """Wait until all that was submitted is scored.

        Raises:
            ConfigError: a question names a task that cannot be built, or a reward returns what is no score.
            EngineError: a worker process, a sandbox or a server that a reward asks does not work.
        """
        submitted, self._submitted = self._submitted, []
        wait([future for part in submitted for _, future in part.pending])  # before others have to wait for this
        with self._judge._lock:
            self._judge._end(submitted)


def _given(sample: Sample) -> dict[str, float]:
    """The scores that there are."""
    return {name: score for name, score in sample.rewards.items() if score is not None}


@dataclass
class _Submitted:
    """A group that is being scored."""

    group: Group
    names: list[str]
    pending: list[tuple[list[Call], "Future[list[Verdict]]"]]
    """What worker processes verify."""
    begun: list[tuple[str, Callable[[], Scores]]]
    """The other rewards' scores."""


def _chunks(group: Group, names: Sequence[str]) -> Iterator[list[Call]]:
    """The isolated verifications of a group, a few samples together; the samples stay the group's own."""
    for name in names:
        for start in range(0, len(group.samples), _CHUNK):
            yield [(name, replace(group, samples=group.samples[start : start + _CHUNK]))]


def _build(name: str, section: Component) -> Reward:
    reward = component.build("reward", section)
    if not isinstance(reward, Reward):
        raise ConfigError(f"rewards.{name}: {section['type']} is not a subclass of megatron_r1.reward.base.Reward")
    if reward.isolated and reward.needs_correctness:
        raise ConfigError(f"rewards.{name}: a reward cannot both be `isolated` and need `sample.correct`")
    return reward


def _weight(name: str, section: Component) -> float:
    weight = section.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ConfigError(f"rewards.{name}.weight is {weight!r}; a finite number was expected")
    return float(weight)
