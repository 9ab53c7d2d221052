"""The process group, Megatron's parallel state, and the seeds: one call at the start of a run."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_r1.config.environment import set_own
from megatron_r1.config.kernels import KernelsSection
from megatron_r1.config.sections import ParallelSection
from megatron_r1.errors import ConfigError

T = TypeVar("T")
R = TypeVar("R")

_PIPELINE_LAYOUT: ContextVar[str | None] = ContextVar("pipeline_layout", default=None)
"""[parallel] pipeline_layout of this run, which Megatron's parallel state does not keep."""

_HOSTS: list[dist.ProcessGroup] = []
"""All ranks over gloo, where the default group is NCCL's."""
TIMEOUT = timedelta(days=1)
"""Longest that ranks wait for one another. A rollout, which may take hours, happens inside one wait; a rank that dies
needs no limit, because torchrun ends the others."""


def initialize(section: ParallelSection, seed: int, kernels: KernelsSection | None = None) -> None:
    """Join the process group (a single process makes its own), lay the ranks out and seed every generator.

    Args:
        section: the run's [parallel].
        seed: of every generator.
        kernels: the run's [model.kernels], where something is trained.

    Raises:
        ConfigError: the layout does not divide the processes.
    """
    if not torch.cuda.is_available() and section.threads:
        torch.set_num_threads(section.threads)
    if not dist.is_initialized():
        if torch.cuda.is_available():
            set_own(cuda_environment(section, kernels or KernelsSection()))
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=TIMEOUT)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
        if backend == "nccl":
            _HOSTS[:] = [dist.new_group(backend="gloo", timeout=TIMEOUT)]
    if not parallel_state.model_parallel_is_initialized():
        _refuse_indivisible(section, dist.get_world_size())
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=section.tensor,
            pipeline_model_parallel_size=section.pipeline,
            virtual_pipeline_model_parallel_size=section.virtual_pipeline if section.virtual_pipeline > 1 else None,
            context_parallel_size=section.context,
            expert_model_parallel_size=section.expert,
            expert_tensor_parallel_size=section.expert_tensor,
            create_gloo_process_groups=False,
        )
    _PIPELINE_LAYOUT.set(section.pipeline_layout)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def cuda_environment(section: ParallelSection, kernels: KernelsSection) -> dict[str, str]:
    """What CUDA, torch and NCCL read when they start. What the user has set wins.

    Queues are what Megatron-LM 0.19.2 asks for (training/arguments.py:1413): with tensor or context parallelism 1, so
    that a collective starts before the product that is to hide it; with `overlap_expert_exchange` many, because
    exchange and products run on streams of their own. With both it leaves the choice; here what was asked for wins.
    """
    environment = {}
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # the same settings by their newer name
        # Packed rows are never of one length: without it memory ends up in pieces that fit none.
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if (
        kernels.cuda_graphs == "local"
    ):  # as Megatron asserts (0.16.1, cuda_graphs.py:1413): NCCL would register addresses
        environment["NCCL_GRAPH_REGISTER"] = "0"
    if kernels.overlap_expert_exchange:
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"
    elif section.tensor > 1 or section.context > 1:
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return environment


def record_generators() -> None:
    """Make Megatron's random generators ones whose state CUDA graphs can replay, with the same seed."""
    model_parallel_cuda_manual_seed(torch.initial_seed(), use_cudagraphable_rng=True, force_reset_rng=True)


def _refuse_indivisible(section: ParallelSection, processes: int) -> None:
    dense, routed = section.tensor * section.context, section.expert * section.expert_tensor
    for unit, names in (
        (dense * section.pipeline, f"tensor {section.tensor} x context {section.context}"),
        (routed * section.pipeline, f"expert {section.expert} x expert_tensor {section.expert_tensor}"),
    ):
        if processes % unit:
            raise ConfigError(
                f"[parallel]: {names} x pipeline {section.pipeline} = {unit} processes hold one model, which does not "
                f"divide the {processes} that there are: start a multiple of {section.fewest}, or change the sizes"
            )


def layout_options() -> dict[str, Any]:
    """The fields of Megatron's `TransformerConfig` that say how this run's model is cut.

    Of one process where no parallel state has been made.
    """
    if not parallel_state.model_parallel_is_initialized():
        return {}
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    options: dict[str, Any] = {
        "tensor_model_parallel_size": tensor,
        "sequence_parallel": tensor > 1,
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
    }
    return options | {"pipeline_model_parallel_layout": _PIPELINE_LAYOUT.get()}


def stages() -> list[int | None]:
    """Numbers of this rank's virtual pipeline stages; [None] without."""
    count = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    return list(range(count)) if count else [None]


def shared_by_processes() -> bool:
    """Whether no process holds the whole model."""
    groups = (
        parallel_state.get_model_parallel_group(),
        parallel_state.get_expert_tensor_model_pipeline_parallel_group(),
    )
    return any(group.size() > 1 for group in groups)


def device() -> torch.device:
    """Where this rank's tensors live."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def is_first_rank() -> bool:
    """True on the one rank that talks to the user and to the rollout engine."""
    return dist.get_rank() == 0


def from_first_rank(produce: Callable[[], T]) -> T:
    """What `produce` returns on the first rank, on every rank; an error there is raised on all.

    The others wait on their processors: over NCCL a kernel would, and take half of a GPU from the engine that the first
    rank waits for.
    """
    outcome: list[Any] = [None, None]
    if is_first_rank():
        try:
            outcome[0] = produce()
        except Exception as error:
            outcome[1] = error
            if dist.get_world_size() == 1:
                raise
    dist.broadcast_object_list(outcome, group=_HOSTS[0] if _HOSTS else None)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def from_every_rank(produce: Callable[[], T]) -> list[T]:
    """What `produce` returns on each rank, in their order, on every rank.

    An error is raised on all when all have ended, of several the lowest rank's. They wait as in `from_first_rank`.
    """
    if dist.get_world_size() == 1:
        return [produce()]
    mine: tuple[T | None, Exception | None]
    try:
        mine = (produce(), None)
    except Exception as error:
        mine = (None, error)
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine, group=_HOSTS[0] if _HOSTS else None)
    for _, raised in of_ranks:
        if raised is not None:
            raise raised
    return [result for result, _ in of_ranks]


def consumed_by_first_rank(consume: Callable[[Iterator[T]], R], items: Iterable[T]) -> R:
    """What `consume(items)` returns on the first rank, on every rank; all ranks take part in making the items.

    An error there is raised on all, after the others have made what they had to.
    """

    def first() -> R:
        try:
            return consume(made)
        finally:
            deque(made, maxlen=0)

    made = iter(items)
    if not is_first_rank():
        deque(made, maxlen=0)
    return from_first_rank(first)
