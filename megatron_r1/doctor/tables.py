"""The tables of a run file, or of each stage of a recipe as `recipe/expand.py` puts it together, without pydantic."""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_r1.config.overlay import merge
from megatron_r1.errors import ConfigError

Tree = dict[str, Any]


def runs(path: Path) -> list[Tree]:
    """The run file; of a recipe those of its stages, and what it says besides.

    Raises:
        ConfigError: it, or one that it names, cannot be read.
    """
    tree = load(path)
    seen = {path.name}
    while isinstance(name := tree.pop("extends", None), str) and name not in seen:
        seen.add(name)
        tree = merge(load(path.parent / name), tree)
    if "stages" not in tree:
        return [tree]
    common, stages = tree.pop("common", {}), tree.pop("stages")
    tree.pop("plan", None)
    whole = [_stage(stage, common, path.parent) for stage in stages.values() if isinstance(stage, dict)]
    suite = _stage(table(tree, "evaluation"), common, path.parent)
    suite.pop("model", None)  # each of [evaluation.models] stands in its place
    return [*whole, suite, tree]


def _stage(own: Tree, common: Tree, folder: Path) -> Tree:
    """`file`, the fragments, the stage's own keys; each over those before."""
    file = own.get("file")
    whole = load(folder / file) if isinstance(file, str) else {}
    for name in own.get("use", []):
        whole = merge(whole, table(common, name))
    return merge(whole, {key: value for key, value in own.items() if key != "plan"})


def every(tree: Tree) -> Iterator[Tree]:
    """A table and all below it."""
    yield tree
    for value in tree.values():
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                yield from every(inner)


def table(tree: Tree, key: str) -> Tree:
    """What stands there, if it is a table; else an empty one."""
    value = tree.get(key)
    return value if isinstance(value, dict) else {}


def load(path: Path) -> Tree:
    """One file of TOML.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read the run file {path}: {error}") from error
