"""What the arguments of `vllm serve` say of an engine's memory and speed."""

import json
from collections.abc import Sequence
from typing import Any

from megatron_r1.config.engine_arguments import by_name, ranks
from megatron_r1.errors import ConfigError
from megatron_r1.plan.rollout import Engine


def engine_of(arguments: Sequence[str], sequences: int, fp8: bool = False) -> Engine:
    """An engine with these arguments.

    Args:
        arguments: of a [rollout] or a [reward_models.NAME].
        sequences: its `max_num_seqs`.
        fp8: whether the folder that it starts on is in FP8.

    Raises:
        ConfigError: a value that is no number, or no JSON.
    """
    given = by_name(arguments)
    tensor, pipeline, data = ranks(arguments)
    drafts = _table(given, "speculative-config")
    return Engine(
        gpus=tensor * pipeline * data,
        weight=1.0 if fp8 or "fp8" in given.get("quantization", "") else 2.0,
        sequences=sequences,
        eager="enforce-eager" in given,
        copies=data,
        redundant=int(_table(given, "eplb-config").get("num_redundant_experts", 0)),
        drafted=int(drafts.get("num_speculative_tokens", 0)),
        memory=_number(given, "gpu-memory-utilization", 0.0) or None,
        cache=1.0 if given.get("kv-cache-dtype", "").startswith("fp8") else 2.0,
    )


def _number(given: dict[str, str], name: str, default: float) -> float:
    try:
        return float(given.get(name) or default)
    except ValueError as error:
        raise ConfigError(f"arguments: --{name}={given[name]} is no number") from error


def _table(given: dict[str, str], name: str) -> dict[str, Any]:
    try:
        found = json.loads(given.get(name) or "{}")
    except ValueError as error:
        raise ConfigError(f"arguments: --{name}={given[name]} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"arguments: --{name}={given[name]} is no JSON object")
    return found
