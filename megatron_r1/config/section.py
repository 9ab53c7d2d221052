"""`Section`: the frozen, typed base of every part of a run file."""

from typing import Any

from pydantic import BaseModel, ConfigDict

Component = dict[str, Any]
"""A section whose `type` names a registered component; the other keys fill that component's own `Config`."""


class Section(BaseModel):
    """One table of a run file: frozen, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        arbitrary_types_allowed=False,
        allow_inf_nan=False,
        use_attribute_docstrings=True,  # the string under a field describes it: `--help` of the checkpoint verbs
    )
