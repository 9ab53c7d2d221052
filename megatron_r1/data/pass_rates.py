"""Which questions are worth asking, by how often their answers have been right.

A question whose answers are all right or all wrong teaches nothing: the samples of its group have no advantage over one
another. So when its turn comes, a question is asked with the probability of its weight: 1 while its pass rate is not
known or lies between two bounds, a `floor` otherwise. Over an epoch questions are so drawn in proportion to their
weights, and none comes twice. (`dynamic_sampling`, DAPO's, samples such groups and then throws them away: to know them
beforehand saves their samples.)

What is drawn is a function of the seed and of what was noted before, so a resumed run that has both draws the same.
"""

import hashlib
from typing import Any

from megatron_r1.config.curriculum import CurriculumSection
from megatron_r1.seeds import stream_seed
from megatron_r1.types import Group, Question

_WHOLE = 2**63
"""Seeds are below it."""

Counts = tuple[tuple[int, int], ...]
"""Of each of the last groups: right answers, and answers that could be judged."""


class PassRates:
    """Notes how questions were answered, and says which are asked again. One thread notes, another may ask.

    Args:
        section: bounds, weights and window.
        seed: of the run.
    """

    def __init__(self, section: CurriculumSection, seed: int) -> None:
        self._section, self._seed = section, seed
        self._counts: dict[str, Counts] = {}

    def note(self, group: Group) -> None:
        """A group was answered and judged; one without verdicts changes nothing."""
        verdicts = [sample.correct for sample in group.samples if sample.correct is not None]
        if verdicts:
            key = self._key(group.question)
            earlier = self._counts.get(key, ())
            self._counts[key] = (*earlier, (sum(verdicts), len(verdicts)))[-self._section.window :]

    def rate(self, question: Question) -> float | None:
        """Share of right answers in the last groups; None before the first."""
        counts = self._counts.get(self._key(question), ())
        return sum(right for right, _ in counts) / sum(judged for _, judged in counts) if counts else None

    def weight(self, question: Question) -> float:
        """Probability that it is asked when its turn comes."""
        rate = self.rate(question)
        inside = rate is None or self._section.low < rate < self._section.high
        return 1.0 if inside else self._section.floor

    def asks(self, question: Question, source: str, position: int) -> bool:
        """Whether the question at this position of a source's stream is asked."""
        return stream_seed("curriculum", self._seed, source, position) < self.weight(question) * _WHOLE

    def state(self) -> dict[str, Counts]:
        """For a checkpoint."""
        return dict(self._counts)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from where a `state` was."""
        self._counts = {key: tuple((right, judged) for right, judged in counts) for key, counts in state.items()}

    def _key(self, question: Question) -> str:
        """The same for the same text in every epoch, wherever in the stream it stands."""
        about, task = question.metadata, question.member
        if self._section.by == "difficulty":
            return f"{task}/{about.get('difficulty', '')}"
        text = hashlib.blake2b(str(about.get("text", question.prompt)).encode(), digest_size=8)
        return f"{task}/{text.hexdigest()}"
