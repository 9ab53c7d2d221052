"""What the learner costs: its step against bare Megatron-core, its start, its memory.

    python tools/bench/learner.py examples/r1_tiny/pretrain.toml
    python tools/bench/learner.py examples/r1_tiny/pretrain.toml --parallel.tensor=2
    python tools/bench/learner.py examples/r1_tiny/pretrain.toml --parallel.processes=2 --parallel.expert=2

A run file of `megatron-r1 pretrain` says model, layout, batch and sequence length; texts are random. The layout's
processes are started here. Three tables:

* tokens/s of `Policy.step`, the figures of a step included (loss, gradient norm, MTP loss, load of experts), against a
  loop of Megatron-core's own pieces in the same layout: `GPTModel` in its data-parallel wrapper, its forward/backward
  schedule, `finalize_model_grads`, the optimizer's step. Both train the same model on the same tokens;
* seconds from the start of the process to the end of the first step, by phase;
* bytes on the first rank by part, predicted (`megatron_r1/model/memory.py`) and measured on real tensors.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import psutil
import torch
import torch.distributed as dist
from paired import Comparison, measure, parser, report, seconds
from rich.console import Console
from rich.table import Table
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megatron_r1.config.load import load
from megatron_r1.config.runs import PretrainConfig
from megatron_r1.loss.cross_entropy import CrossEntropy
from megatron_r1.model.activations import saved_bytes
from megatron_r1.model.build import BuiltModel, build_model
from megatron_r1.model.memory import Memory, Shape, Work, predict
from megatron_r1.model.parallel import device, initialize, is_first_rank
from megatron_r1.model.placement import parameter_counts
from megatron_r1.model.trainable import Trainable
from megatron_r1.optim.optimizer import make_trainable
from megatron_r1.train.batch import from_rows
from megatron_r1.train.policy import Policy

Row = tuple[torch.Tensor, ...]
"""Tokens and labels. [rows, seq]"""
Forward = Callable[[Iterator[Any], torch.nn.Module], tuple[torch.Tensor, Callable[..., Any]]]
"""Megatron's `forward_step_func`."""
UPDATES = 1000
"""Length of the schedule; more than are made."""


class BareMegatron:
    """Megatron-core's own pieces and a loop.

    Args:
        model: what is trained.
        trainable: its wrapper and optimizer.
        forward: one forward pass; None = the cross-entropy of all tokens.
    """

    def __init__(self, model: BuiltModel, trainable: Trainable, forward: Forward | None = None) -> None:
        # Here, because on CPU megatron_r1.model must have prepared Megatron before anything imports it.
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.trainable, self.schedule = trainable, get_forward_backward_func()
        self.forward = forward or _forward
        model.config.grad_scale_func = trainable.optimizer.scale_loss
        model.config.finalize_model_grads_func = finalize_model_grads
        syncs: list[Any] = [ddp.no_sync for ddp in trainable.ddp]
        model.config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]

    def step(self, batches: list[Row]) -> None:
        """One optimizer update on the mean loss."""
        ddp, optimizer = self.trainable.ddp, self.trainable.optimizer
        for chunk in ddp:
            chunk.train()
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        self.schedule(
            forward_step_func=self.forward,
            data_iterator=[iter(batches) for _ in ddp] if len(ddp) > 1 else iter(batches),
            model=ddp,
            num_microbatches=len(batches),
            seq_length=batches[0][0].size(1),
            micro_batch_size=batches[0][0].size(0),
            forward_only=False,
        )
        optimizer.step()
        self.trainable.scheduler.step(1)


def _forward(batches: Iterator[Row], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
    tokens, labels = next(batches)
    positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    return model(tokens, positions, None, labels=labels), _loss


def _loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum over tokens and their number, as Megatron divides where `calculate_per_token_loss` is set."""
    value = output.float().sum()
    count = torch.tensor(output.numel(), dtype=torch.int, device=output.device)
    return value, count, {"loss": value.detach()}


class Phases:
    """Seconds by name, in the order in which they came."""

    def __init__(self) -> None:
        self.seconds = {"python, imports": time.time() - psutil.Process().create_time()}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is done inside."""
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


def texts(config: PretrainConfig, policy: Policy) -> list[Row]:
    """This rank's share of a batch of random texts, the same on ranks that share a model."""
    generator = torch.Generator().manual_seed(config.seed + policy.rank)
    shape = (config.microbatch, config.corpus.sequence_length + 1)
    drawn = []
    for _ in range(config.batch // (config.microbatch * policy.ranks)):
        text = torch.randint(3, policy.model.hf["vocab_size"], shape, generator=generator).to(device())
        drawn.append((text[:, :-1].contiguous(), text[:, 1:].contiguous()))
    return drawn


def measured(trainable: Trainable, batches: list[Row], pipeline: int) -> dict[str, int]:
    """Bytes on this rank after a step; activations of one forward pass where the whole model is here to make one."""
    weights = [param for chunk in trainable.chunks for param in chunk.parameters()]
    buffers = [buffer for ddp in trainable.ddp for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers)]
    held = {weight.untyped_storage().data_ptr() for weight in weights}
    state: dict[int, int] = {}
    for adam in trainable.optimizer.chained_optimizers:
        for main, values in adam.optimizer.state.items():
            for tensor in (main, *(value for value in values.values() if torch.is_tensor(value))):
                state[tensor.data_ptr()] = 0 if tensor.untyped_storage().data_ptr() in held else tensor.nbytes
    parts = {
        "weights": sum(weight.nbytes for weight in weights),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": sum(state.values()),
    }
    if pipeline > 1:
        return parts
    [chunk] = trainable.chunks
    return parts | {"activations": saved_bytes(chunk, lambda: _forward(iter(batches), chunk.train()))}


def predicted(config: PretrainConfig, model: BuiltModel) -> Memory:
    """What the first rank should need."""
    processes = dist.get_world_size()
    work = Work(processes, config.microbatch, config.corpus.sequence_length, 1, torch.cuda.is_available())
    return predict(Shape.of(model.hf, config.model), config.parallel, work)


def show(phases: Phases, expected: Memory, found: dict[str, int]) -> None:
    """The tables of the start and of memory."""
    start = Table(title="start-up", title_justify="left")
    start.add_column("phase")
    start.add_column("s", justify="right")
    for name, value in phases.seconds.items():
        start.add_row(name, f"{value:.2f}")
    start.add_row("all", f"{sum(phases.seconds.values()):.2f}")
    memory = Table(title="memory of the first rank", title_justify="left")
    for column in ("part", "predicted, MB", "measured, MB", "predicted / measured"):
        memory.add_column(column, justify="left" if column == "part" else "right")
    for name, value in found.items():
        bytes_ = getattr(expected, name)
        memory.add_row(name, f"{bytes_ / 1e6:,.2f}", f"{value / 1e6:,.2f}", f"{bytes_ / value:.3f}" if value else "")
    for table in (start, memory):
        Console().print(table)


def in_processes(count: int) -> None:
    """Run this command in so many processes of this node."""
    launched = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    elastic_launch(launched, sys.executable)(__file__, *sys.argv[1:])


def main() -> None:
    chosen, overrides = parser(__doc__, rounds=10).parse_known_args()
    config = load(chosen.run, overrides, PretrainConfig)
    if config.parallel.context > 1:
        raise SystemExit("parallel.context: the bare loop does not cut sequences")
    processes = config.parallel.processes or config.parallel.fewest
    if processes > 1 and "RANK" not in os.environ:
        in_processes(processes)
        return
    phases = Phases()
    with phases.phase("process groups"):
        initialize(config.parallel, config.seed)
    with phases.phase("model" + (", its weights" if config.model.load_weights else "")):
        model = build_model(config.model, config.corpus.sequence_length)
    with phases.phase("optimizer"):
        policy = Policy(model, config.optim, UPDATES)
    batches, length = texts(config, policy), config.corpus.sequence_length
    minibatch = [from_rows(tokens, labels, config.batch * length) for tokens, labels in batches]
    ours = partial(policy.step, minibatch, CrossEntropy())
    with phases.phase("first step"):
        ours()
    found = measured(policy.trainable, batches, config.parallel.pipeline)
    twin = build_model(config.model, length)
    bare = BareMegatron(twin, make_trainable(twin, config.optim, UPDATES))
    tokens = config.batch * length
    comparison = Comparison(
        "Policy.step",
        "tokens/s",
        "bare Megatron-core, the same layout",
        lambda: tokens / seconds(ours),
        lambda: tokens / seconds(partial(bare.step, batches)),
        0.95,
    )
    measure([comparison], chosen.rounds)
    settings = {
        "parameters": parameter_counts(model.chunks).total,
        "layout": config.parallel.model_dump(exclude_defaults=True),
        "tokens_per_step": tokens,
        "dtype": config.model.dtype,
    }
    expected = predicted(config, model)
    if is_first_rank():
        if not chosen.json:
            show(phases, expected, found)
        memory = {name: {"predicted": getattr(expected, name), "measured": value} for name, value in found.items()}
        extra = {"start_up_seconds": phases.seconds, "memory_bytes": memory} if chosen.json else {}
        report("optimizer step", [comparison], chosen.json, **settings, **extra)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
