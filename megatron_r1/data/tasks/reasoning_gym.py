"""Problems and verifiers of the reasoning-gym package: about a hundred procedural datasets under one task."""

import json
import os
from collections.abc import Callable
from functools import lru_cache
from hashlib import blake2b
from typing import Any, ClassVar, cast

import reasoning_gym
from pydantic import Field, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError, model_validator
from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import DATASETS

from megatron_r1.config.section import Component, Section
from megatron_r1.data.tasks.base import Problem, Task
from megatron_r1.data.tasks.curriculum import Curriculum
from megatron_r1.data.tasks.gym_scores import score
from megatron_r1.errors import ConfigError, nearest
from megatron_r1.types import Question

# Some generators do work proportional to their size when they are built, and some cap it; a block keeps
# random access cheap for all of them.
BLOCK = 1024
_RESERVED = ("seed", "size")
_UNORDERED = ("isomorphic_strings", "list_functions", "polynomial_multiplication", "ransom_note")
"""Datasets that draw from a Python set, whose order hangs on the process's hash seed (in version 0.1.25)."""
_BOARDS = ("arc_agi", "rearc")
"""Datasets that compare an answer with tuples, which JSON turns into lists."""


class ReasoningGym(Task):
    """One reasoning-gym dataset as an endless, randomly accessible stream of problems."""

    class Config(Section):
        dataset: str
        """A name in `reasoning_gym.factory.DATASETS`."""
        options: dict[str, Any] = Field(default_factory=dict)
        """The dataset's own settings; `seed` and `size` are set by the task."""
        level: NonNegativeInt | None = None
        """Level of every attribute in the dataset's curriculum; None = the dataset's own settings."""
        levels: dict[str, NonNegativeInt] = {}
        """Attribute of the curriculum -> its level, whatever `level` is."""
        raise_every: PositiveInt | None = None
        """Questions after which `level` rises by one; None = never."""
        max_level: NonNegativeInt | None = None
        """Where it stops; None = at the dataset's highest."""
        difficulty: str | None = None
        """Key of an entry's metadata, such as `num_terms`, by whose value a run reports its pass rates; None = not."""

        @model_validator(mode="after")
        def _rises_from_somewhere(self) -> "ReasoningGym.Config":
            if self.raise_every is not None and self.level is None:
                raise ValueError("raise_every needs a `level` to begin with")
            if self.max_level is not None and (self.raise_every is None or self.max_level < (self.level or 0)):
                raise ValueError(
                    "max_level is where `level` stops rising: it needs raise_every, and is not below level"
                )
            return self

    default_rewards: ClassVar[dict[str, Component]] = {"task": {"type": "task"}, "format": {"type": "format"}}

    def __init__(self, config: Config) -> None:
        """Raises ConfigError for an unknown dataset, attribute or level, or a setting that the dataset refuses."""
        super().__init__(config)
        self._options = _validated(config)
        self._curriculum = Curriculum(config.dataset) if config.level is not None or config.levels else None
        self._block: Callable[[int, int | None, int], ProceduralDataset] = lru_cache(maxsize=4)(self._build_block)
        self._scorer = self._build_block(0, self.level(0), 0, size=1)
        if config.raise_every is not None:
            self._build_block(0, self._top, 0, size=1)  # a level that the dataset refuses is found now

    @property
    def name(self) -> str:
        return str(self.config.dataset)

    def problem(self, seed: int, index: int) -> Problem:
        block, row = divmod(index, BLOCK)
        entry = json.loads(json.dumps(self._block(seed, self.level(index), block)[row]))
        return Problem(
            text=entry["question"].strip(),
            # A few datasets accept any valid answer and have no reference one.
            answer="" if entry["answer"] is None else str(entry["answer"]),
            metadata={"entry": entry, **self._difficulty(entry["metadata"])},
        )

    def level(self, index: int) -> int | None:
        """Level of problem `index`, which follows from the index alone."""
        level: int | None = self.config.level
        if level is None or self.config.raise_every is None:
            return level
        return min(level + index // self.config.raise_every, self._top)

    def verify(self, question: Question, answer: str) -> float:
        entry = question.metadata["entry"]
        if self.config.dataset in _BOARDS:
            board = tuple(tuple(line) for line in entry["metadata"]["output"])
            entry = {**entry, "metadata": {**entry["metadata"], "output": board}}
        return score(self.name, self._scorer.score_answer, answer, entry)

    def _difficulty(self, known: dict[str, Any]) -> dict[str, str]:
        key = self.config.difficulty
        if key is None:
            return {}
        if not isinstance(known.get(key), str | int | float):
            plain = sorted(name for name, value in known.items() if isinstance(value, str | int | float))
            raise ConfigError(
                f"reasoning-gym dataset {self.name!r}: difficulty = {key!r} is no plain value of its metadata"
                f"{nearest(key, plain)}; there are {', '.join(plain)}"
            )
        return {"difficulty": f"{key} {known[key]}"}

    def __reduce__(self) -> tuple[type["ReasoningGym"], tuple[Config]]:
        return ReasoningGym, (self.config,)

    @property
    def _top(self) -> int:
        assert self._curriculum is not None
        highest = self._curriculum.highest
        return highest if self.config.max_level is None else int(self.config.max_level)

    def _build_block(self, seed: int, level: int | None, block: int, size: int = BLOCK) -> ProceduralDataset:
        # Datasets seed row i with seed + i, so nearby seeds would share rows; a digest spreads them apart.
        digest = blake2b(f"{seed}/{block}".encode(), digest_size=4).digest()
        spread = int.from_bytes(digest, "big") >> 1
        settings = {**self._options, **self._at(level)}
        try:
            return reasoning_gym.create_dataset(self.name, **settings, seed=spread, size=size)
        except (AssertionError, ValueError, TypeError) as error:
            at = "" if level is None else f" at level {level}"
            raise ConfigError(f"reasoning-gym dataset {self.name!r} refuses its options{at}: {error}") from error

    def _at(self, level: int | None) -> dict[str, Any]:
        """The curriculum's part of the settings."""
        if self._curriculum is None:
            return {}
        settings = self._curriculum.settings(level, self.config.levels)
        for key in settings:
            if key in self._options:
                raise ConfigError(f"reasoning-gym dataset {self.name!r}: option {key!r} is set by its level as well")
        return settings


def _validated(config: ReasoningGym.Config) -> dict[str, Any]:
    """The options, checked against the dataset's own dataclass and converted to its types."""
    where = f"reasoning-gym dataset {config.dataset!r}"
    if config.dataset not in DATASETS:
        raise ConfigError(
            f"reasoning-gym has no dataset {config.dataset!r}{nearest(config.dataset, DATASETS)}; "
            f"it has {len(DATASETS)}, listed by `reasoning_gym.factory.DATASETS`"
        )
    if config.dataset in _UNORDERED and os.environ.get("PYTHONHASHSEED", "random") == "random":
        raise ConfigError(
            f"{where} draws other problems in every process, so a run could not be resumed and held-out problems would "
            "not stay the same, unless Python's hash seed is fixed: set the environment variable PYTHONHASHSEED=0"
        )
    schema = DATASETS[config.dataset][1]
    known = [name for name in schema.__dataclass_fields__ if name not in _RESERVED]
    for key in config.options:
        if key in _RESERVED:
            raise ConfigError(f"{where}: option {key!r} is set by the task and cannot be chosen")
        if key not in known:
            raise ConfigError(f"{where} has no option {key!r}{nearest(key, known)}; it has {', '.join(known)}")
    try:
        typed = TypeAdapter(schema).validate_python(config.options)
    except ValidationError as error:
        reasons = [f"{'.'.join(map(str, e['loc']))}: {e['msg']} (it is {e['input']!r})" for e in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(reasons)) from error
    return cast(dict[str, Any], {key: getattr(typed, key) for key in config.options})
