"""Components by name: a built-in's short name, or `package.module:Name` for a user's own."""

import importlib
from typing import Any

from megatron_r1.errors import ConfigError, nearest

BUILT_IN: dict[str, dict[str, str]] = {
    "task": {
        "reasoning_gym": "megatron_r1.data.tasks.reasoning_gym:ReasoningGym",
    },
    "reward": {
        "accuracy": "megatron_r1.reward.accuracy:Accuracy",
        "format": "megatron_r1.reward.format:Format",
    },
    "advantage": {
        "group_relative": "megatron_r1.advantage.group_relative:GroupRelative",
    },
    "loss": {
        "grpo": "megatron_r1.loss.grpo:Grpo",
    },
    "family": {
        "DeepseekV3ForCausalLM": "megatron_r1.model.families.deepseek_v3:DeepseekV3",
    },
}


def resolve(kind: str, name: str) -> Any:
    """The object that `name` stands for.

    Args:
        kind: one of the keys of `BUILT_IN`.
        name: a built-in's name, or `package.module:Name`.

    Raises:
        ConfigError: no such built-in (the nearest is named), or the import fails.
    """
    built_in = BUILT_IN[kind]
    target = built_in.get(name, name)
    if ":" not in target:
        raise ConfigError(
            f"no {kind} is called {name!r}{nearest(name, built_in)}; "
            f"built in: {', '.join(sorted(built_in))}; your own is named 'package.module:Name'"
        )
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{kind} {name!r} cannot be imported: {error}") from error
