"""Cosine reward: how much a right or wrong answer counts by the length of the response."""

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_r1.config.section import Section
from megatron_r1.reward.base import Reward
from megatron_r1.types import Group, Sample

_OPEN_R1 = {"correct_short": 1.0, "correct_long": 0.5, "wrong_short": 0.0, "wrong_long": -0.5, "max_length": 1000}


class Cosine(Reward):
    """From the value for short responses to the one for long ones along half a cosine, apart for right and wrong.

    Right answers earn more the shorter they are; wrong ones lose less the longer they are, for thinking longer is how
    they may become right: CosFn of "Demystifying Long Chain-of-Thought Reasoning in LLMs", arXiv 2502.03373. With
    `t` the length, at most `max_length`: `long + (short - long) / 2 * (1 + cos(pi * t / max_length))`.
    None where nothing judged the answer. The paper warns that repetition stretches wrong answers: add
    `repetition_penalty`.

    `compatible = "open-r1"` gives get_cosine_scaled_reward of open-r1 with the defaults of its scripts: the length in
    characters is not cut at `max_length`, beyond which the value rises again; short wrong answers get 0.0 and long
    ones -0.5, the reverse of its docstring; an answer that cannot be judged gets 1.0.
    """

    needs_correctness = True

    class Config(Section):
        compatible: Literal["open-r1"] | None = None
        correct_short: float = 1.0
        correct_long: float = 0.5
        wrong_short: float = -1.0
        wrong_long: float = -0.5
        cut: float | None = None
        """Value of a response that was cut at the length limit (the paper's r_e); None = as any other."""
        max_length: int = Field(32768, ge=1)
        """Length from which on the value for long responses holds."""
        unit: Literal["tokens", "characters"] = "tokens"

        @model_validator(mode="before")
        @classmethod
        def _original_defaults(cls, given: Any) -> Any:
            if isinstance(given, dict) and given.get("compatible") == "open-r1":
                return {**_OPEN_R1, "unit": "characters", **given}
            return given

    config: Config

    def __call__(self, group: Group) -> list[float | None]:
        return [self._score(sample) for sample in group.samples]

    def _score(self, sample: Sample) -> float | None:
        config = self.config
        if sample.correct is None:
            return 1.0 if config.compatible else None
        if config.cut is not None and not sample.finished:
            return config.cut
        length = sample.length if config.unit == "tokens" else len(sample.text)
        if not config.compatible:
            length = min(length, config.max_length)
        short, long = (
            (config.correct_short, config.correct_long) if sample.correct else (config.wrong_short, config.wrong_long)
        )
        return long + 0.5 * (short - long) * (1 + math.cos(math.pi * length / config.max_length))
