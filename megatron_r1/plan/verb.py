"""`megatron-r1 plan`."""

import json
from collections.abc import Sequence
from typing import Any

from megatron_r1.config.plan import PlanConfig
from megatron_r1.config.reward_model import RewardModelConfig
from megatron_r1.errors import ConfigError
from megatron_r1.plan.page import write_page
from megatron_r1.plan.plan import Plan, as_dict, plan, refuse_illegal
from megatron_r1.plan.proof import real_state
from megatron_r1.plan.run_file import read
from megatron_r1.plan.table import print_plan

PLAIN: dict[str, str | int] = {"moments": "float32", "gradients": "float32", "master": "float32", "offload": 0}
"""[optim] of what can be proved."""


def run(options: PlanConfig, overrides: Sequence[str], as_json: bool) -> int:
    """Plan a run file; returns the exit code, 1 where it does not fit or a proof fails.

    Raises:
        ConfigError: an unreadable or unsupported run file; a proof of a layout that cannot be started.
        DataError: an unreadable or unsupported `config.json`.
    """
    verb, config = read(options.run_file, overrides)
    made = plan(verb, config, options, searching=options.search)
    description = as_dict(made)
    if options.prove:
        if config.optim.precision_aware:
            plain = " ".join(
                f"--optim.{key}={value}" for key, value in PLAIN.items() if getattr(config.optim, key) != value
            )
            raise ConfigError(f"--prove is of an optimizer in float32 on the GPU: prove it with {plain} at the end")
        refuse_illegal(made)
        description["proof"] = prove(made)
    if options.html:
        write_page(made, options.html, str(options.run_file))
    if as_json:
        print(json.dumps(description))
    else:
        print_plan(made, description.get("proof"))
    proved = all(row["equal"] for row in description.get("proof", []))
    return 0 if description["fits"] and proved else 1


def prove(made: Plan) -> list[dict[str, Any]]:
    """Each distinct rank's bytes as planned, and as its real modules have them."""
    rows = []
    for rank in made.memory:
        scalar = isinstance(made.run, RewardModelConfig)
        real = real_state(made.run.model, made.run.parallel, made.gpus, rank.rank, scalar)
        planned = {name: getattr(rank, name) for name in real}
        rows.append(
            {"rank": rank.rank, "ranks": rank.ranks, "planned": planned, "real": real, "equal": planned == real}
        )
    return rows
