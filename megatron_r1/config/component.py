"""Components from their TOML sections: `type` names one, the other keys fill its `Config`."""

from functools import partial
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel

from megatron_r1.config.load import validate
from megatron_r1.config.section import Section
from megatron_r1.errors import ConfigError
from megatron_r1.registry import resolve

WEIGHT = "weight"
"""Key of a reward's section that is the judge's, not the reward's."""


class Weighted(Section):
    """What the judge reads of a reward's section."""

    weight: float = 1.0


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
    _, config = _resolve(kind, section)
    own = config.model_dump(mode="json", exclude_none=True)
    if kind != "reward":
        return {**section, **own}
    weight = {WEIGHT: section[WEIGHT]} if WEIGHT in section else {}
    return {**section, **validate(Weighted, weight, where="a reward").model_dump(), **own}


def default_rewards(*tasks: dict[str, Any]) -> dict[str, Any]:
    """The [rewards] of a run over these tasks that names none: what the tasks themselves are scored by.

    Raises:
        ConfigError: two tasks mean different things by one name.
    """
    rewards: dict[str, Any] = {}
    for task in tasks:
        for name, section in build("task", task).default_rewards.items():
            if rewards.setdefault(name, dict(section)) != section:
                raise ConfigError(
                    f"the default reward {name!r} of {task['type']!r} is not that of the run's other task; "
                    "write [rewards], and in each task's section name those that score it: rewards = [...]"
                )
    return rewards


def _resolve(kind: str, section: dict[str, Any]) -> tuple[Any, BaseModel]:
    if not isinstance(section, dict):
        raise ConfigError(f"a {kind} is a section, {{ type = ... }}; it is {section!r}")
    options = dict(section)
    if kind == "reward":
        options.pop(WEIGHT, None)
    name = options.pop("type", None)
    if not isinstance(name, str):
        raise ConfigError(f"a {kind} section needs a `type`; it has {sorted(section)}")
    cls = resolve(kind, name)
    own = getattr(cls, "Config", None)
    if not (isinstance(own, type) and issubclass(own, Section)):
        raise ConfigError(
            f"{kind} {name!r} has no `Config` that derives from megatron_r1.config.section.Section: derive the class "
            f"from the base class of every {kind}, as docs/extending.md shows, or give it one"
        )
    if missing := getattr(cls, "__abstractmethods__", None):
        raise ConfigError(f"{kind} {name!r} has to define {', '.join(sorted(missing))}, as docs/extending.md shows")
    return cls, validate(own, options, where=f"{kind} {name!r}")


TaskComponent = Annotated[dict[str, Any], AfterValidator(partial(complete, "task"))]
RewardComponent = Annotated[dict[str, Any], AfterValidator(partial(complete, "reward"))]
AdvantageComponent = Annotated[dict[str, Any], AfterValidator(partial(complete, "advantage", default="group_relative"))]
ToolComponent = Annotated[dict[str, Any], AfterValidator(partial(complete, "tool"))]
LossComponent = Annotated[dict[str, Any], AfterValidator(partial(complete, "loss", default="grpo"))]
