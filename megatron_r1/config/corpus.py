"""What pretraining reads: indexed datasets, how `data index` makes them and how `pretrain` blends them."""

import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Field, PositiveFloat, PositiveInt, Tag, field_validator, model_validator

from megatron_r1.config.section import Section

DatasetName = Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")]
"""Becomes part of a file's name."""


def _is_list(value: Any) -> str:
    return "list" if isinstance(value, list) else "path"


Files = Annotated[
    Annotated[Path, Tag("path")] | Annotated[list[Path], Field(min_length=1), Tag("list")], Discriminator(_is_list)
]


class IndexConfig(Section):
    """`megatron-r1 data index`: documents -> Megatron indexed datasets.

    ::

        output = "runs/index"
        tokenizer = "runs/tokenizer"
        split = { train = 0.98, validation = 0.01, test = 0.01 }

        [inputs]
        web = "corpus/web"                            # a folder of JSONL and Parquet files
        code = ["corpus/a.jsonl.zst", "b.parquet"]
    """

    inputs: dict[DatasetName, Files] = Field(min_length=1)
    """Name of the dataset -> JSONL (plain, .gz, .zst) or Parquet file, folder of such files, or list of both. Writes
    `<output>/<name>.bin` and `.idx`."""
    output: Path
    tokenizer: Path
    text_key: str = "text"
    """The key, or the column, that holds a document's text."""
    split: dict[DatasetName, PositiveFloat] = {}
    """Name -> share of the documents, 1 in all: cuts each input into `<output>/<name>/<split>`. A hash of the text
    decides, so equal documents stay together, and more documents move none. Empty = not cut."""
    workers: PositiveInt | None = None
    """Processes. Default: one for each core. The result does not depend on it."""

    @field_validator("split")
    @classmethod
    def _whole(cls, split: dict[str, float]) -> dict[str, float]:
        if split and not math.isclose(sum(split.values()), 1, abs_tol=1e-6):
            raise ValueError(f"the shares add up to {sum(split.values()):g}, not to 1")
        return split


class WeightedDataset(Section):
    """One dataset of a blend."""

    path: Path
    """Without the .bin/.idx ending."""
    weight: PositiveFloat
    """Share of the rows, relative to the other weights."""


def _has_weights(value: Any) -> str:
    return "paths" if isinstance(value, list) and all(isinstance(part, str | Path) for part in value) else "weighted"


Datasets = Annotated[
    Annotated[list[Path], Tag("paths")] | Annotated[list[WeightedDataset], Tag("weighted")], Discriminator(_has_weights)
]
"""Paths, or paths with weights."""


class CorpusSection(Section):
    """[corpus] of `pretrain`.

    ::

        train = [{ path = "index/web", weight = 0.7 }, { path = "index/code", weight = 0.3 }]
        validation = ["index/held_out"]
        test = ["index/never_looked_at"]
        sequence_length = 4096
        fim_rate = 0.1
    """

    train: Datasets
    """Megatron indexed datasets, without the .bin/.idx ending; without weights each counts by its tokens."""
    validation: Datasets = []
    """Their loss is taken during the run."""
    test: Datasets = []
    """Their loss is taken once, after the last step."""
    sequence_length: PositiveInt
    fim_rate: float = Field(default=0.0, ge=0, le=1)
    """Share of the training documents that are rearranged for filling in the middle; DeepSeek-V3: 0.1."""

    @model_validator(mode="after")
    def _each_once(self) -> "CorpusSection":
        if not self.train:
            raise ValueError("`train` names no dataset")
        for datasets in (self.train, self.validation, self.test):
            paths = [part if isinstance(part, Path) else part.path for part in datasets]
            for path in paths:
                if paths.count(path) > 1:
                    raise ValueError(f"{path} is named twice; `weight` is how one dataset gets a larger share")
        return self
