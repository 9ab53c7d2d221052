"""Problems and verifiers of the reasoning-gym package: about a hundred procedural datasets under one task."""

from collections.abc import Callable
from functools import lru_cache
from hashlib import blake2b
from typing import Any, ClassVar, cast

import reasoning_gym
from pydantic import Field, TypeAdapter, ValidationError
from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import DATASETS

from megatron_r1.config.section import Component, Section
from megatron_r1.data.tasks.base import Problem
from megatron_r1.errors import ConfigError, nearest
from megatron_r1.types import Question

# Some generators do work proportional to their size when they are built, and some cap it; a block keeps
# random access cheap for all of them.
BLOCK = 1024
_RESERVED = ("seed", "size")


class ReasoningGym:
    """One reasoning-gym dataset as an endless, randomly accessible stream of problems."""

    class Config(Section):
        dataset: str
        """A name in `reasoning_gym.factory.DATASETS`."""
        options: dict[str, Any] = Field(default_factory=dict)
        """The dataset's own settings; `seed` and `size` are set by the task."""

    default_rewards: ClassVar[dict[str, Component]] = {"accuracy": {"type": "accuracy"}, "format": {"type": "format"}}

    def __init__(self, config: Config) -> None:
        """Raises ConfigError for an unknown dataset or a setting that the dataset refuses."""
        self.config = config
        self._settings = _validated(config)
        self._block: Callable[[int, int], ProceduralDataset] = lru_cache(maxsize=4)(self._build_block)
        self._scorer = self._build_block(0, 0, size=1)

    @property
    def name(self) -> str:
        return self.config.dataset

    def problem(self, seed: int, index: int) -> Problem:
        block, row = divmod(index, BLOCK)
        entry = self._block(seed, block)[row]
        return Problem(
            text=entry["question"].strip(),
            # A few datasets accept any valid answer and have no reference one.
            answer="" if entry["answer"] is None else str(entry["answer"]),
            metadata={"entry": entry},
        )

    def verify(self, question: Question, answer: str) -> float:
        return float(self._scorer.score_answer(answer, question.metadata["entry"]))

    def __reduce__(self) -> tuple[type["ReasoningGym"], tuple[Config]]:
        return ReasoningGym, (self.config,)

    def _build_block(self, seed: int, block: int, size: int = BLOCK) -> ProceduralDataset:
        # Datasets seed row i with seed + i, so nearby seeds would share rows; a digest spreads them apart.
        digest = blake2b(f"{seed}/{block}".encode(), digest_size=4).digest()
        spread = int.from_bytes(digest, "big") >> 1
        try:
            return reasoning_gym.create_dataset(self.config.dataset, **self._settings, seed=spread, size=size)
        except (AssertionError, ValueError, TypeError) as error:
            raise ConfigError(f"reasoning-gym dataset {self.name!r} refuses its options: {error}") from error


def _validated(config: ReasoningGym.Config) -> dict[str, Any]:
    """The options, checked against the dataset's own dataclass and converted to its types."""
    where = f"reasoning-gym dataset {config.dataset!r}"
    if config.dataset not in DATASETS:
        raise ConfigError(
            f"reasoning-gym has no dataset {config.dataset!r}{nearest(config.dataset, DATASETS)}; "
            f"it has {len(DATASETS)}, listed by `reasoning_gym.factory.DATASETS`"
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
