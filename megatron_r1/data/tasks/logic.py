"""Logic: several of reasoning-gym's datasets in given shares."""

from typing import Any, ClassVar

from pydantic import Field, PositiveFloat

from megatron_r1.config import component
from megatron_r1.config.section import Component, Section
from megatron_r1.data.tasks.base import Problem, Task
from megatron_r1.data.tasks.shares import Shares
from megatron_r1.errors import ConfigError
from megatron_r1.seeds import stream_seed
from megatron_r1.types import Question

_DATASETS = {
    "codeio": 2.0,
    "caesar_cipher": 1.0,
    "cryptarithm": 1.0,
    "zebra_puzzles": 2.0,
    "knights_knaves": 2.0,
    "puzzle24": 2.0,
    "countdown": 1.0,
    "coin_flip": 1.0,
    "dice": 1.0,
    "syllogism": 1.0,
    "self_reference": 1.0,
}


class Logic(Task):
    """Procedural puzzles with verifiers.

    By default the kinds that DeepSeek-R1 names for its logic data: predicting inputs and outputs of code, ciphers,
    zebra puzzles, the 24 game, probability; and deduction in words.
    """

    class Config(Section):
        datasets: dict[str, PositiveFloat] = Field(default=_DATASETS, min_length=1)
        """Dataset of reasoning-gym -> its weight."""
        settings: dict[str, dict[str, Any]] = {}
        """Dataset -> keys of a `reasoning_gym` section: options, level, levels, raise_every, max_level."""

    default_rewards: ClassVar[dict[str, Component]] = {"task": {"type": "task"}, "format": {"type": "format"}}

    def __init__(self, config: Config) -> None:
        """Raises ConfigError for an unknown dataset, or settings that do not fit one."""
        super().__init__(config)
        for name in config.settings:
            if name not in config.datasets:
                raise ConfigError(f"logic: settings for {name!r}, which is not among the datasets")
        self._shares = Shares(config.datasets)
        self._parts: dict[str, Task] = {
            name: component.build("task", {**config.settings.get(name, {}), "type": "reasoning_gym", "dataset": name})
            for name in config.datasets
        }

    @property
    def name(self) -> str:
        return "logic"

    def problem(self, seed: int, index: int) -> Problem:
        name, number = self._shares.place(seed, index)
        problem = self._parts[name].problem(stream_seed("dataset", seed, name), number)
        problem.metadata["dataset"] = name
        return problem

    def verify(self, question: Question, answer: str) -> float:
        return self._parts[question.metadata["dataset"]].verify(question, answer)
