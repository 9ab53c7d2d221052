"""Responses of several models to the same prompts, as a judge will be shown them."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_r1.config.evaluation import SamplingSection, ServedModelSection
from megatron_r1.config.preferences import PreferencesConfig
from megatron_r1.curate.asking import different, excluded
from megatron_r1.reward.response import response, scored_part
from megatron_r1.rollout.answers import Answer
from megatron_r1.rollout.sampling import OpenEngine, Sampler
from megatron_r1.seeds import stream_seed
from megatron_r1.types import Question, Sample


@dataclass(frozen=True)
class Response:
    """One response that can be judged."""

    id: str
    """Of the model and the place among its responses to this prompt."""
    model: str
    text: str
    """As it was sampled: what follows the prompt."""
    part: str
    """What the judge is shown."""
    length: int
    """Of the part, tokens."""


Dropped = dict[str, Any]
"""A row of `dropped.jsonl`: `reason`, `question_id`, and what was seen."""


class Responses:
    """Has each model answer all prompts, and keeps what can be judged.

    Raises:
        ConfigError: a task without an end and without `questions`, or with fewer than these.
        DataError: a model, tokenizer or data set that cannot be read.
        EngineError: the engines do not start or die.
    """

    def __init__(self, config: PreferencesConfig, open_engine: OpenEngine) -> None:
        seed, taken = stream_seed("preferences", config.seed), excluded(config.exclude)
        self.questions = different("data", config.data, config.questions, seed, taken)
        self.sampled = 0
        self.dropped: list[Dropped] = []
        """Responses that cannot be judged."""
        self._of: defaultdict[str, list[Response]] = defaultdict(list)
        for name in config.models:  # one model's engines at a time
            self._sample(config, name, open_engine)

    def __iter__(self) -> Iterator[tuple[Question, list[Response]]]:
        """Each prompt with the responses that can be judged."""
        return ((asked, self._of[asked.id]) for asked in self.questions)

    def _sample(self, config: PreferencesConfig, name: str, open_engine: OpenEngine) -> None:
        with Sampler(_sampling(config, name), config.output / "engines" / name, open_engine) as sampler:
            answered = sampler.answers(self.questions, len(self.questions), {}, None, config.samples)
            for asked, answers in answered:
                self.sampled += len(answers)
                for number, answer in enumerate(answers):
                    part = scored_part(_whole(asked, answer), config.judged)
                    if not answer.finished or not part:
                        reason = "no summary" if answer.finished else "not finished"
                        self.dropped.append({"reason": reason, "question_id": asked.id, "response": answer.text})
                        continue
                    length = len(sampler.tokenizer.encode(part))
                    self._of[asked.id].append(Response(f"{name}-{number}", name, answer.text, part, length))

    def figures(self) -> dict[str, Any]:
        reasons = Counter(row["reason"] for row in self.dropped)
        usable = self.sampled - len(self.dropped)
        return {"sampled": self.sampled, "usable": usable, "dropped": dict(sorted(reasons.items()))}


def _sampling(config: PreferencesConfig, name: str) -> SamplingSection:
    model = config.models[name]
    return SamplingSection(
        model=ServedModelSection(path=model.path, dtype=model.dtype),
        tokenizer=model.tokenizer,
        rollout=model.rollout,
        samples=config.samples,
        batch=config.batch,
        seed=stream_seed("preferences", config.seed, name),
    )


def _whole(asked: Question, answer: Answer) -> str:
    """With the `<think>` that a template has put into the prompt."""
    return response(asked, Sample([], [], answer.text, answer.finished, 0))
