"""TOML file + dotted overrides -> typed, frozen config; and back to TOML for `--dry-run` and the run directory."""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import tomli_w
from pydantic import BaseModel, ValidationError

from megatron_r1.errors import ConfigError, nearest

T = TypeVar("T", bound=BaseModel)


def load(path: Path, overrides: Sequence[str], schema: type[T]) -> T:
    """Read a run file and apply `--section.key=value` overrides.

    Args:
        path: the TOML file.
        overrides: strings such as `--optim.lr=1e-4`; values are TOML, a bare word is a string.
        schema: the run's config class.

    Raises:
        ConfigError: missing or malformed file, unknown key (the nearest is named), wrong type or value.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the run file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the run file {path} is not UTF-8 text: {error}") from error
    if not text.strip():
        raise ConfigError(f"the run file {path} is empty")
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    for override in overrides:
        _apply(tree, override)
    return validate(schema, tree, where=str(path))


def validate(schema: type[T], tree: dict[str, Any], where: str) -> T:
    """`schema` filled from `tree`; every mistake in it is listed in one `ConfigError`."""
    try:
        # Strict JSON mode takes a string for a path, but no 1 for true and no "7" for 7.
        return schema.model_validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        lines = [_explain(schema, entry) for entry in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from error


def dump(config: BaseModel) -> str:
    """The resolved config, defaults included, as TOML (keys that are unset are left out)."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.removeprefix("--").partition("=")
    if not override.startswith("--") or not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form --section.key=value")
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        parsed = {}
    value = parsed["value"] if len(parsed) == 1 else text
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {parent!r} is a value, not a section")
    node[leaf] = value


def _explain(schema: type[BaseModel], entry: Any) -> str:
    location = [str(part) for part in entry["loc"]]
    dotted = ".".join(location)
    if entry["type"] == "extra_forbidden":
        if len(location) > 1 and location[-1] in schema.model_fields:
            return f"unknown key {dotted!r}: {location[-1]!r} belongs at the top, before the first [section]"
        return f"unknown key {dotted!r}{nearest(location[-1], _keys(schema, location[:-1]))}"
    if entry["type"] == "missing":
        return f"{dotted!r} is missing"
    given = "" if isinstance(entry["input"], dict) else f" (it is {entry['input']!r})"
    message = entry["msg"].removeprefix("Value error, ")
    return f"{dotted}: {message}{given}" if dotted else message


def _keys(schema: type[BaseModel], path: list[str]) -> list[str]:
    """The keys that are known at `path` below `schema`."""
    for part in path:
        field = schema.model_fields.get(part)
        inner = field.annotation if field else None
        models = [kind for kind in (inner, *get_args(inner)) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not models:
            return []
        schema = models[0]
    return list(schema.model_fields)
