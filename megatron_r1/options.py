"""Command-line options made from a config class: one a field, with the field's docstring as its help."""

import argparse
import tomllib
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_r1.config.load import validate


def add(command: argparse.ArgumentParser, schema: type[BaseModel]) -> None:
    """Give `command` what `schema` asks for: a positional for each required field, an option for any other."""
    for name, field in schema.model_fields.items():
        about = (field.description or "").replace("\n", " ").replace("`", "").replace("%", "%%")
        if field.is_required():
            command.add_argument(name, metavar=name.upper(), help=about)
        elif field.annotation is bool:  # the option is what changes it
            flag = _flag(f"no_{name}" if field.default else name)
            command.add_argument(flag, action="store_const", const=not field.default, dest=name, help=about)
        else:
            command.add_argument(_flag(name), metavar=_values(name, field), dest=name, help=about + _default(field))


def read(options: argparse.Namespace, schema: type[BaseModel]) -> BaseModel:
    """`schema` filled from what was given.

    Raises:
        ConfigError: a value that the schema refuses.
    """
    given = {name: getattr(options, name) for name in schema.model_fields}
    tree = {name: _typed(value, schema.model_fields[name]) for name, value in given.items() if value is not None}
    return validate(schema, tree, where=f"megatron-r1 {options.verb}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _values(name: str, field: FieldInfo) -> str:
    """What stands for the value in the help."""
    kinds = (field.annotation, *get_args(field.annotation))
    choices = [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    return "|".join(choices) or name.upper()


def _default(field: FieldInfo) -> str:
    """The value of an option that is not given, where that says something."""
    return f" Default: {field.default}." if field.default_factory is None and field.default not in {None, ""} else ""


def _typed(value: Any, field: FieldInfo) -> Any:
    """A number where the field takes one."""
    if not isinstance(value, str) or not {int, float} & {field.annotation, *get_args(field.annotation)}:
        return value
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value
