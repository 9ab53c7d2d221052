"""What a stage reads that no stage of the recipe makes: models, data, prompts, code of one's own."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import megatron_r1
from megatron_r1.config.recipe import Tree
from megatron_r1.data.tables import LINES, PARQUET
from megatron_r1.recipe.tree import MARK, texts

FOLDER_KEYS = ("source", "path")
"""Keys of components whose text may name a folder; any other text counts only if it names a file."""
LONGEST = 1024
"""Characters; a longer text is no path."""


def outside_files(config: BaseModel, resolved: Tree, commands: Sequence[Sequence[str]], output: Path) -> list[str]:
    """The files and folders that a stage and its services name and that lie outside the recipe's output.

    A field that is a path, and a text that ends as a data file does, has to exist when the stage runs. Any other text
    is one if it exists now: a file of Python in `type = "my_lab/rewards.py:Brevity"`, a folder in `source = "./data"`,
    the folder of a judge's model in the command of a service.

    Args:
        config: the stage's run file.
        resolved: the same as a tree, in general form (`generalize`).
        commands: of the services it needs.
        output: of the recipe, absolute.
    """
    package = Path(megatron_r1.__file__).parent
    found = [str(path) for path in _paths(config)]
    found += [text for text in texts(resolved) if text.endswith((*LINES, PARQUET)) and not text.startswith(MARK)]
    found += [file for text in texts([resolved, list(commands)]) if (file := _as_file(text))]
    found += [text for text in _folder_texts(resolved) if _may_be_path(text) and place(text).is_dir()]
    found += [text for text in texts(list(commands)) if _may_be_path(text) and (place(text) / "config.json").is_file()]
    absolute = {text: place(text).absolute() for text in found}
    inside = (output, package)
    return sorted(text for text, path in absolute.items() if not any(path.is_relative_to(folder) for folder in inside))


def place(text: str) -> Path:
    """Where a text points; `~` of somebody who does not exist stays as it is, as a shell has it."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 (that of Path raises)


def _paths(value: Any) -> Iterator[Path]:
    """Every path that is a field of a config or of its sections."""
    if isinstance(value, Path):
        yield value
    elif isinstance(value, BaseModel):
        yield from _paths({name: getattr(value, name) for name in type(value).model_fields})
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _paths(inner)


def _as_file(text: str) -> str | None:
    """The file that a text names, `file.py:Name` included."""
    name = text.rpartition(":")[0] if ".py:" in text else text
    return name if _may_be_path(name) and place(name).is_file() else None


def _may_be_path(text: str) -> bool:
    """Could it be one, rather than a word? (Names too long for a file system would be an error to ask about.)"""
    parts = Path(text).parts
    return (
        bool(text)
        and len(text) < LONGEST
        and not set("\n\0") & set(text)
        and max(map(len, parts), default=0) < 200
        and ("/" in text or "." in text)
        and not text.startswith(MARK)
    )


def _folder_texts(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        yield from (value for key, value in tree.items() if key in FOLDER_KEYS and isinstance(value, str))
    if isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _folder_texts(value)
