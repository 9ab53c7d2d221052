"""Soft overlong punishment of DAPO: responses near the length limit lose gradually, beyond it fully."""

from typing import Self

from pydantic import Field, model_validator

from megatron_r1.config.section import Section
from megatron_r1.reward.base import Reward
from megatron_r1.types import Group


class SoftOverlongPunishment(Reward):
    """0 up to `max_length - cache` tokens, then falling linearly to -1 at `max_length`, and -1 beyond.

    DAPO (arXiv 2503.14476), equation 13; the same in open-r1, whose defaults these are. Give `max_length` the run's
    longest response, or no response reaches the punishment.
    """

    class Config(Section):
        max_length: int = Field(16384, ge=1)
        cache: int = Field(4096, ge=1)
        """Tokens before `max_length` over which the punishment grows."""

        @model_validator(mode="after")
        def _room_before_the_cache(self) -> Self:
            if self.cache >= self.max_length:
                raise ValueError(f"cache ({self.cache}) must be smaller than max_length ({self.max_length})")
            return self

    config: Config

    def __call__(self, group: Group) -> list[float | None]:
        return [self._score(sample.length) for sample in group.samples]

    def _score(self, length: int) -> float:
        free = self.config.max_length - self.config.cache
        return max(-1.0, min(0.0, (free - length) / self.config.cache))
