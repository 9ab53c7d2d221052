"""Components from their TOML sections."""

from typing import Any

from megatron_r1.config.load import validate
from megatron_r1.errors import ConfigError
from megatron_r1.registry import resolve


def build(kind: str, section: dict[str, Any]) -> Any:
    """Instantiate a component from its TOML section: `type` names it, the other keys fill its `Config`.

    A component is a class with a nested or attached `Config` (a `config.Section`) and
    `__init__(self, config)`.
    """
    options = dict(section)
    name = options.pop("type", None)
    if not isinstance(name, str):
        raise ConfigError(f"a {kind} section needs a `type`; it has {sorted(section)}")
    component = resolve(kind, name)
    config = validate(component.Config, options, where=f"{kind} {name!r}")
    return component(config)
