"""The process group, Megatron's parallel state, and the seeds: one call at the start of a run."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_r1.config.sections import ParallelSection

T = TypeVar("T")

TIMEOUT = timedelta(days=1)
"""Longest that ranks wait for one another. A rollout, which may take hours, happens inside one wait; a rank that dies
needs no limit, because torchrun ends the others."""


def initialize(section: ParallelSection, seed: int) -> None:
    """Join the process group (a single process makes its own) and seed every generator."""
    if not torch.cuda.is_available() and section.threads:
        torch.set_num_threads(section.threads)
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=TIMEOUT)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def device() -> torch.device:
    """Where this rank's tensors live."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def is_first_rank() -> bool:
    """True on the one rank that talks to the user and to the rollout engine."""
    return dist.get_rank() == 0


def from_first_rank(produce: Callable[[], T]) -> T:
    """What `produce` returns on the first rank, on every rank; an error there is raised on all."""
    outcome: list[Any] = [None, None]
    if is_first_rank():
        try:
            outcome[0] = produce()
        except Exception as error:
            outcome[1] = error
            if dist.get_world_size() == 1:
                raise
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result
