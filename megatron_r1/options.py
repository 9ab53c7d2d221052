"""Command-line options made from a config class: one a field, with the field's docstring as its help."""

import argparse
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_r1.config.card import CardConfig
from megatron_r1.config.load import validate


def add(command: argparse.ArgumentParser, schema: type[BaseModel]) -> None:
    """Give `command` what `schema` asks for: a positional for each required path, an option for any other field."""
    card = command.add_argument_group("model card (README.md of the output)")
    for name, field in schema.model_fields.items():
        group = card if name in CardConfig.model_fields and issubclass(schema, CardConfig) else command
        about = (field.description or "").replace("\n", " ").replace("`", "").replace("%", "%%")
        if field.json_schema_extra == {"option": False}:
            continue
        if field.is_required() and field.annotation is Path:
            group.add_argument(name, metavar=name.upper(), help=about)
        elif field.annotation is bool:  # the option is what changes it
            flag = _flag(f"no_{name}" if field.default else name)
            group.add_argument(flag, action="store_const", const=not field.default, dest=name, help=about)
        elif get_origin(field.annotation) is list:
            about += " Can be given several times."
            group.add_argument(_flag(name), action="append", metavar=name.upper(), dest=name, help=about)
        else:
            group.add_argument(_flag(name), dest=name, help=about + _default(field), **_value(name, field))


def read(options: argparse.Namespace, schema: type[BaseModel]) -> BaseModel:
    """`schema` filled from what was given.

    Raises:
        ConfigError: a value that the schema refuses.
    """
    given = {name: getattr(options, name, None) for name in schema.model_fields}
    return validate(schema, {name: value for name, value in given.items() if value is not None}, where="options")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _value(name: str, field: FieldInfo) -> dict[str, Any]:
    """What argparse may take, and what stands for it in the help."""
    kinds = (field.annotation, *get_args(field.annotation))
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    plain = [get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in kinds]
    kind = next((kind for kind in (int, float) if kind in plain), str)
    metavar = "|".join(choices) or name.upper()
    return {"required": field.is_required(), "choices": choices or None, "type": kind, "metavar": metavar}


def _default(field: FieldInfo) -> str:
    """The value of an option that is not given, where that says something."""
    if field.is_required() or field.default_factory or field.default in {None, ""}:
        return ""
    return f" Default: {field.default:,}." if isinstance(field.default, int) else f" Default: {field.default}."
