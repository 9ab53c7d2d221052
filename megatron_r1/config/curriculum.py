"""[curriculum] of `rl`: which questions are asked again, by how they were answered."""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from megatron_r1.config.section import Section


class CurriculumSection(Section):
    """[curriculum]: questions are drawn by their measured pass rate (`data/pass_rates.py`)."""

    low: float = Field(default=0.0, ge=0, lt=1)
    """Pass rate, share of right answers, above which a question is asked whenever its turn comes; ..."""
    high: float = Field(default=1.0, gt=0, le=1)
    """... and below which. By themselves the bounds leave out what is never or always right, which has no advantage."""
    floor: float = Field(default=0.1, gt=0, le=1)
    """Weight of all other questions: the probability with which one of them is asked when its turn comes, so that one
    that has become easier or harder is noticed."""
    window: PositiveInt = 1
    """The last groups that a pass rate is measured on."""
    by: Literal["question", "difficulty"] = "question"
    """What has a pass rate: each question by itself, or all of one task's with the same `difficulty`. Tasks that make
    up problems never repeat one, so only the second does something there; give it a wider `window`."""

    @model_validator(mode="after")
    def _ordered(self) -> "CurriculumSection":
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}: no pass rate lies between them")
        return self
