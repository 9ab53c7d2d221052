"""Environment variables that a learner has for itself, and that servers which it starts must not inherit.

A vLLM server beside the learner with the learner's `expandable_segments` cannot share memory between its GPUs, and dies
in its all-reduce; a number of CUDA queues that suits the learner's collectives slows it down; and one with torchrun's
variables looks for its own processes at the learner's meeting place (torch/distributed/rendezvous.py:188).
"""

import os
from collections.abc import Mapping

OWN = "MEGATRON_R1_LEARNERS_OWN"
"""Environment variable with the names of those that a learner has set; processes below it know them by this."""
TORCHRUN = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
)
"""What torchrun tells each of its processes, beside names that begin with TORCHELASTIC_."""


def set_own(values: Mapping[str, str]) -> None:
    """Set variables of this process. What the user has set stays."""
    own = _own()
    for name, value in values.items():
        if name in own or name not in os.environ:
            os.environ[name] = value
            own.add(name)
    if own:
        os.environ[OWN] = ",".join(sorted(own))


def inherited() -> dict[str, str]:
    """This process's variables but for those above: what the user has set, for whatever program."""
    left_out = _own() | {OWN}
    if "TORCHELASTIC_RUN_ID" in os.environ:
        left_out |= {*TORCHRUN, *(name for name in os.environ if name.startswith("TORCHELASTIC_"))}
    return {name: value for name, value in os.environ.items() if name not in left_out}


def _own() -> set[str]:
    return set(filter(None, os.environ.get(OWN, "").split(",")))
