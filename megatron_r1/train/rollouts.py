"""What is asked at each step, and the groups that come of it to be trained on."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_r1.config.runs import RLConfig
from megatron_r1.data.pass_rates import PassRates
from megatron_r1.data.questions import Questions
from megatron_r1.errors import ConfigError
from megatron_r1.report.rollout_figures import uniform
from megatron_r1.seeds import stream_seed
from megatron_r1.train.collector import Collector
from megatron_r1.train.policy import Figures
from megatron_r1.types import Group, Question

_DRAWN = "questions_drawn"
"""What a checkpoint calls how many questions of [data] were taken; of another source its name comes before."""
IN_FLIGHT = "in_flight"
"""What a checkpoint calls groups that are begun and not trained on (`ahead.py`)."""
PASS_RATES = "pass_rates"
"""What it calls how questions were answered, where that matters ([curriculum])."""


@dataclass
class Rollout:
    """The groups of one step."""

    groups: list[Group]
    """Those to train on, as many as the run file says."""
    sampled: list[Group]
    """All that were sampled for them."""
    figures: Figures
    seconds: float
    """In which these were sampled."""


class Sources:
    """[data] and, from `general.from_step` on, [general]: each one stream of questions.

    Args:
        config: the run.
        exclude: bare texts that are never asked.
    """

    def __init__(self, config: RLConfig, exclude: frozenset[str]) -> None:
        self._config = config
        self._sources = {"data": Questions(config.data, config.seed, exclude)}
        if config.general:
            seed = stream_seed("general", config.seed)
            self._sources["general"] = Questions(config.general, seed, exclude)
        self.drawn = dict.fromkeys(self._sources, 0)
        """How many questions of each were taken, or passed over."""
        self._rates = PassRates(config.curriculum, config.seed) if config.curriculum else None
        self._passed_over = 0

    def state(self) -> Figures:
        """How many questions were drawn so far, to be kept with a checkpoint."""
        return {_name(source): float(count) for source, count in self.drawn.items()}

    def restore(self, figures: dict[str, Any]) -> None:
        """Go on from where a `state` was."""
        self.drawn = {source: int(figures.get(_name(source), 0)) for source in self.drawn}
        if self._rates:
            self._rates.restore(figures.get(PASS_RATES, {}))

    def wanted(self, step: int) -> dict[str, int]:
        """Questions of each source in a step's rollout."""
        general = self._config.general
        count = general.questions(self._config.questions) if general and step >= general.from_step else 0
        return {"data": self._config.questions - count} | ({"general": count} if count else {})

    def question(self, source: str, position: int) -> Question:
        """The one at a position of a source."""
        [question] = self._sources[source].take(position, 1)
        return question

    def draw(self, source: str) -> int:
        """Position of the next one; with [curriculum] some are passed over."""
        while True:
            position = self.drawn[source]
            self.drawn[source] += 1
            if not self._rates or self._rates.asks(self.question(source, position), source, position):
                return position
            self._passed_over += 1

    def take(self, source: str, count: int) -> list[Question]:
        """The next ones."""
        return [self.question(source, self.draw(source)) for _ in range(count)]

    def note(self, groups: Sequence[Group]) -> Figures:
        """These were answered; returns how many were passed over since the last call."""
        if not self._rates:
            return {}
        for group in groups:
            self._rates.note(group)
        passed_over, self._passed_over = self._passed_over, 0
        return {"questions_passed_over": float(passed_over)}

    def kept(self) -> dict[str, Any]:
        """What to keep with a checkpoint besides `state`, and give to `restore` with it."""
        return {PASS_RATES: self._rates.state()} if self._rates else {}


class Rollouts:
    """Draws a step's questions, and has them answered while the learner waits.

    With `dynamic_sampling` (DAPO, arXiv 2503.14476, 3.2) a group whose rewards are all equal, which has no advantage,
    is dropped and other questions are asked in its place, for so many rounds; what is lacking then is filled with
    dropped groups. Each source is one stream of questions; how far it is used up is all that a resumed run needs.

    Args:
        config: the run.
        exclude: bare texts that are never asked.
    """

    def __init__(self, config: RLConfig, exclude: frozenset[str]) -> None:
        self._config = config
        self._sources = Sources(config, exclude)
        self._returned: float | None = None

    def state(self) -> Figures:
        """How many questions were drawn so far, to be kept with a checkpoint."""
        return self._sources.state()

    def kept(self) -> dict[str, Any]:
        """What else; nothing is in flight between two steps."""
        return self._sources.kept()

    def restore(self, figures: dict[str, Any]) -> None:
        """Go on from where a `state` was.

        Raises:
            ConfigError: groups were in flight there.
        """
        if (figures.get(IN_FLIGHT) or {"ledger": {"live": []}})["ledger"]["live"]:
            raise ConfigError(
                "the checkpoint is of a run with rollout.max_staleness above 0 and has groups in flight, which a "
                "synchronous run would skip: go on with max_staleness above 0, or choose another output folder"
            )
        self._sources.restore(figures)

    def sample(self, collector: Collector, step: int) -> Rollout:
        """`{o_i} ~ pi_old(.|q)` and their rewards, for the questions of a step."""
        config, tick = self._config, time.perf_counter()
        wanted = self._sources.wanted(step)
        kept: dict[str, list[Group]] = {source: [] for source in wanted}
        dropped: dict[str, list[Group]] = {source: [] for source in wanted}
        sampled: list[Group] = []
        rounds = config.dynamic_sampling.max_rounds if config.dynamic_sampling else 1
        for number in range(rounds):
            lacking = {source: count - len(kept[source]) for source, count in wanted.items()}
            if not any(lacking.values()):
                break
            asked = [(source, one) for source, count in lacking.items() for one in self._sources.take(source, count)]
            seed = stream_seed("rollout", config.seed, step, *([number] if number else []))
            groups = collector.collect([question for _, question in asked], config.group_size, seed)
            for (source, _), group in zip(asked, groups, strict=True):
                (dropped if config.dynamic_sampling and uniform(group) else kept)[source].append(group)
            sampled += groups
        chosen = [group for source, count in wanted.items() for group in (kept[source] + dropped[source])[:count]]
        figures = self._figures(dropped, len(sampled) / len(chosen)) | self._sources.note(sampled)
        before, self._returned = self._returned, time.perf_counter()
        seconds = self._returned - tick
        if before is not None:
            figures["learner_idle"] = seconds / (self._returned - before)
        return Rollout(chosen, sampled, figures, seconds)

    def _figures(self, dropped: dict[str, list[Group]], effort: float) -> Figures:
        if not self._config.dynamic_sampling:
            return {}
        return {"dropped_groups": float(sum(map(len, dropped.values()))), "sampled_per_kept": effort}


def _name(source: str) -> str:
    return _DRAWN if source == "data" else f"{source}_{_DRAWN}"
