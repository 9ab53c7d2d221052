"""Rollouts with generation that goes on while the learner trains: `rollout.max_staleness` above 0.

As `Rollouts`, and used in its place: `sample` gives a step's groups. But those were begun by the weights of up to
`max_staleness` steps before, and when it returns the fleet already works on the next ones.
"""

import time
from collections import Counter
from typing import Any

from megatron_r1.config.runs import RLConfig
from megatron_r1.model.parallel import is_first_rank
from megatron_r1.rollout.admission import Admission
from megatron_r1.seeds import stream_seed
from megatron_r1.train.collector import Collector
from megatron_r1.train.feed import Feed, Taken
from megatron_r1.train.policy import Figures
from megatron_r1.train.rollouts import IN_FLIGHT, Rollout, Sources
from megatron_r1.types import Group, Question, Sample


class Deal:
    """Which question is begun next. One that is not trained on is replaced by another of the same source.

    Args:
        sources: of questions.
        questions: of a step.
    """

    def __init__(self, sources: Sources, questions: int) -> None:
        self.sources, self._questions = sources, questions
        self._places = 0
        """Begun, replacements not counted."""
        self._owed: list[str] = []
        """Sources of questions that are to be replaced."""

    def begin(self) -> str:
        """Takes a question; returns its name."""
        source = self._owed.pop(0) if self._owed else self._next_source()
        return f"{source}:{self.sources.draw(source)}"

    def replace(self, key: str) -> None:
        """This one will not be trained on."""
        self._owed.append(key.partition(":")[0])

    def question(self, key: str) -> Question:
        """The one of this name."""
        source, _, position = key.partition(":")
        return self.sources.question(source, int(position))

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"places": self._places, "owed": list(self._owed), "drawn": dict(self.sources.drawn)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from where a `state` was."""
        self._places, self._owed = state["places"], list(state["owed"])
        self.sources.drawn = {source: state["drawn"].get(source, 0) for source in self.sources.drawn}

    def skip(self, steps: int) -> None:
        """So many steps were done without a deal: the checkpoint is a synchronous run's."""
        self._places = steps * self._questions

    def _next_source(self) -> str:
        """The general prompts of a step are spread evenly over it."""
        step, place = divmod(self._places, self._questions)
        self._places += 1
        general = self.sources.wanted(step).get("general", 0)
        turn = (place + 1) * general // self._questions > place * general // self._questions
        return "general" if turn else "data"


class Ahead:
    """Draws questions as far ahead as the rule lets it, and gives steps what is complete.

    With `dynamic_sampling` a group whose rewards are all equal is replaced as soon as it is judged. A step has as many
    replacements as it would have in a synchronous run with all rounds.

    Args:
        config: the run.
        exclude: bare texts that are never asked.
    """

    def __init__(self, config: RLConfig, exclude: frozenset[str]) -> None:
        self._config = config
        section = config.rollout
        self._deal = Deal(Sources(config, exclude), config.questions)
        self._admission = Admission(
            config.questions, section.max_staleness, section.late, section.over_sampling, config.steps
        )
        self._begun: dict[str, Any] | None = None
        self._feed: Feed | None = None
        """On the first rank."""
        self._state = self._deal.sources.state()
        self._returned = time.perf_counter()

    def state(self) -> Figures:
        """Totals of the run so far, to be shown; `kept` is what a resumed run needs."""
        return self._state

    def kept(self) -> dict[str, Any]:
        """What is in flight, to be kept with a checkpoint: on the first rank, which writes it, and alone needs it."""
        if not is_first_rank():
            return {}
        return {IN_FLIGHT: self._feed.state() if self._feed else self._begun} | self._deal.sources.kept()

    def restore(self, figures: dict[str, Any]) -> None:
        """Go on from where `state` and `kept` were; or from a synchronous run's checkpoint."""
        self._deal.sources.restore(figures)
        self._begun = figures.get(IN_FLIGHT) if is_first_rank() else None
        self._state = self._deal.sources.state()

    def sample(self, collector: Collector, step: int) -> Rollout:
        """The groups of a step and their rewards, as soon as the rule has them."""
        here: list[Taken] = []
        tick = time.perf_counter()

        def take() -> tuple[list[str], list[tuple[list[int], list[Sample]]], Figures, Figures]:
            feed = self._feed = self._feed or self._open(collector, step)
            taken = None
            while taken is None:
                with collector.interruptible():
                    feed.wait()
                taken = feed.take()  # out of the reach of signals: what is taken is trained on
            waited = time.perf_counter() - tick
            here.append(taken)
            noted = self._deal.sources.note(taken.groups + taken.replaced)
            parts = [(group.prompt_tokens, group.samples) for group in taken.groups]
            return taken.keys, parts, self._figures(taken, step, waited) | noted, self._totals()

        keys, parts, figures, self._state = collector.at_first_rank(take)
        # Every rank has the questions, and those of code bring megabytes of tests.
        questions = (self._deal.question(key) for key in keys)
        elsewhere = (Group(question, *part) for question, part in zip(questions, parts, strict=True))
        groups = here[0].groups if here else list(elsewhere)
        sampled = groups + (here[0].replaced if here else [])
        seconds, self._returned = time.perf_counter() - self._returned, time.perf_counter()
        return Rollout(groups, sampled, figures, seconds)

    def _open(self, collector: Collector, step: int) -> Feed:
        """Begin to sample."""
        config = self._config
        if self._begun:
            self._deal.restore(self._begun["order"])
        else:
            self._admission.step = self._admission.version = step
            self._deal.skip(step)
        rounds = config.dynamic_sampling.max_rounds if config.dynamic_sampling else 1
        service = collector.service(self._seeds)
        self._returned = time.perf_counter()
        return collector.opened(
            Feed(self._admission, self._deal, service, (rounds - 1) * config.questions, self._begun)
        )

    def _seeds(self, key: str) -> list[int]:
        """Of the samples of a group, whatever weights and engine answer it."""
        return [stream_seed("rollout", self._config.seed, key, sample) for sample in range(self._config.group_size)]

    def _totals(self) -> Figures:
        ages, groups = self._admission.staleness, sum(self._admission.staleness.values())
        shares = {f"groups_staleness_{age}": count / groups for age, count in sorted(ages.items())}
        return self._deal.sources.state() | {"groups_not_trained_on": float(self._admission.dropped)} | shares

    def _figures(self, taken: Taken, step: int, waited: float) -> Figures:
        samples = [sample for group in taken.groups for sample in group.samples]
        ages = Counter(step - min(sample.weight_version for sample in group.samples) for group in taken.groups)
        figures = {f"staleness/{age}": count / len(taken.groups) for age, count in sorted(ages.items())}
        tokens = sum(sample.length for sample in samples)
        figures |= {
            "staleness": sum(age * count for age, count in ages.items()) / len(taken.groups),
            "stale_tokens": sum(_older(sample, step) for sample in samples) / tokens,
            "learner_idle": waited / max(time.perf_counter() - self._returned, waited, 1e-9),
        }
        if self._config.dynamic_sampling:
            replaced = len(taken.replaced)
            figures |= {"dropped_groups": float(replaced), "sampled_per_kept": 1 + replaced / len(taken.groups)}
        if self._config.rollout.late == "drop":
            figures["late_groups"] = float(taken.dropped)
        return figures


def _older(sample: Sample, version: int) -> int:
    """Tokens of a response that older weights have made."""
    if not sample.weight_spans:
        return sample.length if sample.weight_version < version else 0
    return max((end for made_by, end in sample.weight_spans if made_by < version), default=0)
