"""Components from their TOML sections: `type` names one, the other keys fill its `Config`."""

from functools import partial
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel

from megatron_r1.config.load import validate
from megatron_r1.errors import ConfigError
from megatron_r1.registry import resolve

WEIGHT = "weight"
"""Key of a reward's section that is the judge's, not the reward's."""


def build(kind: str, section: dict[str, Any]) -> Any:
    """Instantiate a component from its section.

    A component is a class with a nested or attached `Config` (a `config.Section`) and `__init__(self, config)`.

    Raises:
        ConfigError: no `type`, one that cannot be imported or has no `Config`, or keys that do not fit it.
    """
    cls, config = _resolve(kind, section)
    return cls(config)


def complete(kind: str, section: dict[str, Any], default: str | None = None) -> dict[str, Any]:
    """The section with the component's defaults filled in, so that a dry run shows and checks them.

    `default` is the `type` of a section that names none.
    """
    section = {"type": default, **section} if default else section
    own = {key: value for key, value in section.items() if key != WEIGHT or kind != "reward"}
    _, config = _resolve(kind, own)
    return {**section, **config.model_dump(mode="json", exclude_none=True)}


def default_rewards(task: dict[str, Any]) -> dict[str, Any]:
    """The [rewards] of a run over this task that names none: what the task itself is scored by."""
    return {name: dict(section) for name, section in build("task", task).default_rewards.items()}


def _resolve(kind: str, section: dict[str, Any]) -> tuple[Any, BaseModel]:
    options = dict(section)
    name = options.pop("type", None)
    if not isinstance(name, str):
        raise ConfigError(f"a {kind} section needs a `type`; it has {sorted(section)}")
    cls = resolve(kind, name)
    if not hasattr(cls, "Config"):
        raise ConfigError(f"{kind} {name!r} has no `Config`: a class derived from megatron_r1's Section, beside it")
    return cls, validate(cls.Config, options, where=f"{kind} {name!r}")


TaskComponent = Annotated[dict[str, Any], AfterValidator(partial(complete, "task"))]
RewardComponent = Annotated[dict[str, Any], AfterValidator(partial(complete, "reward"))]
AdvantageComponent = Annotated[dict[str, Any], AfterValidator(partial(complete, "advantage", default="group_relative"))]
LossComponent = Annotated[dict[str, Any], AfterValidator(partial(complete, "loss", default="grpo"))]
