"""What is asked at each step, and the groups that come of it to be trained on."""

from dataclasses import dataclass

from megatron_r1.config.runs import RLConfig
from megatron_r1.data.questions import Questions
from megatron_r1.report.rollout_figures import uniform
from megatron_r1.seeds import stream_seed
from megatron_r1.train.collector import Collector
from megatron_r1.train.policy import Figures
from megatron_r1.types import Group, Question

_DRAWN = "questions_drawn"
"""What a checkpoint calls how many questions of [data] were taken; of another source its name comes before."""


@dataclass
class Rollout:
    """The groups of one step."""

    groups: list[Group]
    """Those to train on, as many as the run file says."""
    sampled: list[Group]
    """All that were sampled for them."""
    figures: Figures


class Rollouts:
    """Draws questions from [data] and, from `general.from_step` on, [general], and has them answered.

    With `dynamic_sampling` (DAPO, arXiv 2503.14476, 3.2) a group whose rewards are all equal, which has no advantage,
    is dropped and other questions are asked in its place, for so many rounds; what is lacking then is filled with
    dropped groups. Each source is one stream of questions; how far it is used up is all that a resumed run needs.

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
        self._drawn = dict.fromkeys(self._sources, 0)

    def state(self) -> Figures:
        """How many questions were drawn so far, to be kept with a checkpoint."""
        return {_name(source): float(count) for source, count in self._drawn.items()}

    def restore(self, figures: Figures) -> None:
        """Go on from where a `state` was."""
        self._drawn = {source: int(figures.get(_name(source), 0)) for source in self._drawn}

    def sample(self, collector: Collector, step: int) -> Rollout:
        """`{o_i} ~ pi_old(.|q)` and their rewards, for the questions of a step."""
        config = self._config
        wanted = self._wanted(step)
        kept: dict[str, list[Group]] = {source: [] for source in wanted}
        dropped: dict[str, list[Group]] = {source: [] for source in wanted}
        sampled: list[Group] = []
        rounds = config.dynamic_sampling.max_rounds if config.dynamic_sampling else 1
        for number in range(rounds):
            lacking = {source: count - len(kept[source]) for source, count in wanted.items()}
            if not any(lacking.values()):
                break
            asked = [(source, one) for source, count in lacking.items() for one in self._take(source, count)]
            seed = stream_seed("rollout", config.seed, step, *([number] if number else []))
            groups = collector.collect([question for _, question in asked], config.group_size, seed)
            for (source, _), group in zip(asked, groups, strict=True):
                (dropped if config.dynamic_sampling and uniform(group) else kept)[source].append(group)
            sampled += groups
        chosen = [group for source, count in wanted.items() for group in (kept[source] + dropped[source])[:count]]
        return Rollout(chosen, sampled, self._figures(dropped, len(sampled) / len(chosen)))

    def _wanted(self, step: int) -> dict[str, int]:
        """Questions of each source in a step's rollout."""
        general = self._config.general
        count = general.questions(self._config.questions) if general and step >= general.from_step else 0
        return {"data": self._config.questions - count} | ({"general": count} if count else {})

    def _take(self, source: str, count: int) -> list[Question]:
        first = self._drawn[source]
        self._drawn[source] += count
        return [one for position in range(first, first + count) for one in self._sources[source].take(position, 1)]

    def _figures(self, dropped: dict[str, list[Group]], effort: float) -> Figures:
        if not self._config.dynamic_sampling:
            return {}
        return {"dropped_groups": float(sum(map(len, dropped.values()))), "sampled_per_kept": effort}


def _name(source: str) -> str:
    return _DRAWN if source == "data" else f"{source}_{_DRAWN}"
