"""The "@stage/rest" in tables of run files that name results of other stages."""

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_r1.errors import ConfigError

MARK = "@"


def texts(tree: Any) -> Iterator[str]:
    """Every string that is a value somewhere in a tree."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from texts(value)


def reference(text: str) -> tuple[str, str] | None:
    """`"@base/hf"` -> `("base", "hf")`, `"@base"` -> `("base", "")`; None for any other text.

    A text that begins with two of them is not a reference: it stands for itself without the first.

    Raises:
        ConfigError: a path that leaves the stage's folder.
    """
    if not text.startswith(MARK) or text.startswith(2 * MARK):
        return None
    stage, _, rest = text.removeprefix(MARK).partition("/")
    path = PurePosixPath(rest)
    if path.is_absolute() or ".." in path.parts:
        raise ConfigError(f"{text!r} leaves the folder of the stage {stage!r}: write {MARK}stage/path/inside/it")
    return stage, str(path) if rest else ""


def resolve(tree: Any, output: Path) -> Any:
    """The tree with real paths: `"@base/hf"` becomes `"<output>/base/hf"`."""
    return _map(tree, lambda text: _resolved(text, output))


def generalize(tree: Any, output: Path) -> Any:
    """The inverse of `resolve`: a tree that holds wherever the recipe's output lies."""
    return _map(tree, lambda text: _generalized(text, output))


def _resolved(text: str, output: Path) -> str:
    if named := reference(text):
        return str(output.joinpath(*named))
    return text.removeprefix(MARK) if text.startswith(MARK) else text


def _generalized(text: str, output: Path) -> str:
    if text.startswith(f"{output}/"):
        return MARK + text.removeprefix(f"{output}/")
    return MARK + text if text.startswith(MARK) else text


def _map(tree: Any, change: Callable[[str], str]) -> Any:
    if isinstance(tree, str):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _map(value, change) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_map(value, change) for value in tree]
    return tree
