"""Components of a user's own, named in the run files of these tests as `module:Name`."""

import time
from pathlib import Path
from typing import Any

from megatron_r1.loss.base import LossInputs, Metrics
from megatron_r1.loss.grpo import Grpo
from megatron_r1.reward.base import Reward
from megatron_r1.types import Group


class Digits(Reward):
    """Share of digits in a response: even a model that has learned nothing differs in it from sample to sample."""

    def __call__(self, group: Group) -> list[float | None]:
        return [sum(c.isdigit() for c in sample.text) / (1 + len(sample.text)) for sample in group.samples]


class Held(Grpo):
    """GRPO that waits before a gradient for as long as a file exists; as many minibatches as it says may pass.

    It also writes down, where a file is named for it, how many samples it is given.
    """

    class Config(Grpo.Config):
        file: Path
        """Empty = no minibatch may pass."""
        counted: Path | None = None
        """Gets a line for each minibatch: its samples."""

    _given = 0
    """Minibatches, since the process was started."""

    def token_weights(self, lengths: list[int]) -> list[float]:
        assert isinstance(self.config, Held.Config)
        self._given += 1
        if self.config.counted:
            with self.config.counted.open("a") as counted:
                counted.write(f"{len(lengths)}\n")
        return super().token_weights(lengths)

    def __call__(self, logprobs: Any, inputs: LossInputs) -> tuple[Any, Metrics]:
        while self._held():
            time.sleep(0.02)
        return super().__call__(logprobs, inputs)

    def _held(self) -> bool:
        assert isinstance(self.config, Held.Config)
        try:
            return self._given > int(self.config.file.read_text() or 0)
        except FileNotFoundError:
            return False


class Announced(Grpo):
    """GRPO that says once, by renaming a file, that an update is under way, and lingers in it."""

    class Config(Grpo.Config):
        marker: Path

    def __call__(self, logprobs: Any, inputs: LossInputs) -> tuple[Any, Metrics]:
        assert isinstance(self.config, Announced.Config)
        if self.config.marker.exists():
            self.config.marker.rename(self.config.marker.with_suffix(".seen"))
            time.sleep(2)
        return super().__call__(logprobs, inputs)
