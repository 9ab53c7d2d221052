"""The judge: every reward of every sample, and their weighted sum.

Rewards that only look at a text run here. Those that run a verifier on what the policy wrote (`isolated`)
go to worker processes; one that hangs or kills its worker scores 0, and no other sample suffers for it.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from types import TracebackType

from megatron_r1.config import component
from megatron_r1.config.section import Component
from megatron_r1.errors import ConfigError
from megatron_r1.reward.base import Reward
from megatron_r1.reward.verifiers import Verifiers
from megatron_r1.reward.worker import Call, Verdict
from megatron_r1.types import Group, Sample

_CHUNK = 64
"""Samples sent to a worker at once: a step costs few messages, and workers share the load evenly."""

log = logging.getLogger(__name__)


class Judge:
    """Fills `sample.rewards` and `sample.reward`.

    Args:
        rewards: the run file's [rewards]: name -> section with `type`, `weight` (1.0) and the reward's own keys.
        tasks: sections of the tasks whose verifiers will be needed; workers load them before they start.
        workers: processes for isolated rewards.
        timeout: seconds that one verification may take.

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
        self._rewards: dict[str, Reward] = {name: component.build("reward", s) for name, s in sections.items()}
        self._isolated = {name: s for name, s in sections.items() if self._rewards[name].isolated}
        self._tasks = list(tasks)
        self._workers = workers
        self._timeout = timeout
        self._verifiers: Verifiers | None = None
        self.counters: Counter[str] = Counter(verifier_timeouts=0, verifier_crashes=0)
        """Verifications that scored 0 because they ran past the time limit, or died or raised."""

    def __enter__(self) -> "Judge":
        if self._isolated:
            self._verifiers = Verifiers(self._isolated, self._tasks, self._workers, self._timeout)
            for _ in range(self._workers):  # have the processes ready by the time they are needed
                self._verifiers.submit([])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._verifiers is not None:
            self._verifiers.close()
            self._verifiers = None

    def __call__(self, groups: Sequence[Group]) -> None:
        """Score all samples of `groups` in place.

        Raises:
            ConfigError: a question names a task that cannot be built, or a reward returns what is no score.
            EngineError: a worker process does not start.
        """
        # Workers verify while the other rewards are computed here.
        pending = [(chunk, self._submit(chunk)) for chunk in self._chunks(groups)]
        for group in groups:
            for name, reward in self._rewards.items():
                if name not in self._isolated:
                    _store(name, group.samples, reward(group))
        for chunk, future in pending:
            self._collect(chunk, future.result())
        for group in groups:
            for sample in group.samples:
                sample.reward = self._weighted_sum(sample)

    def _weighted_sum(self, sample: Sample) -> float:
        parts = ((self.weights[name], sample.rewards[name]) for name in self.weights)
        return sum(weight * value for weight, value in parts if value is not None)

    def _chunks(self, groups: Sequence[Group]) -> Iterator[list[Call]]:
        """The isolated verifications of `groups`, at most `_CHUNK` samples together."""
        chunk: list[Call] = []
        room = _CHUNK
        for name in self._isolated:
            for group in groups:
                for start in range(0, len(group.samples), _CHUNK):
                    part = replace(group, samples=group.samples[start : start + _CHUNK])
                    if len(part.samples) > room:
                        yield chunk
                        chunk, room = [], _CHUNK
                    chunk.append((name, part))
                    room -= len(part.samples)
        if chunk:
            yield chunk

    def _submit(self, calls: list[Call]) -> "Future[list[Verdict]]":
        assert self._verifiers is not None, "a judge with isolated rewards works inside its `with` block"
        slim = [
            (name, Group(group.question, [], [replace(s, tokens=[], logprobs=[], rewards={}) for s in group.samples]))
            for name, group in calls
        ]
        return self._verifiers.submit(slim)

    def _collect(self, calls: list[Call], verdicts: list[Verdict]) -> None:
        samples = [(name, group.question, sample) for name, group in calls for sample in group.samples]
        for (name, question, sample), verdict in zip(samples, verdicts, strict=True):
            if verdict.error is not None:
                self.counters["verifier_timeouts" if verdict.timed_out else "verifier_crashes"] += 1
                log.warning("reward %r of question %s scores 0: %s", name, question.id, verdict.error)
            _store(name, [sample], [verdict.score if verdict.error is None else 0.0])


def _store(name: str, samples: Sequence[Sample], values: Sequence[float | None]) -> None:
    if len(values) != len(samples):
        raise ConfigError(f"reward {name!r} returned {len(values)} scores for {len(samples)} samples")
    for sample, value in zip(samples, values, strict=True):
        if value is not None and not math.isfinite(value):
            raise ConfigError(f"reward {name!r} returned {value}; a score is a finite number or None")
        sample.rewards[name] = value


def _weight(name: str, section: Component) -> float:
    weight = section.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ConfigError(f"rewards.{name}.weight is {weight!r}; a finite number was expected")
    return float(weight)
