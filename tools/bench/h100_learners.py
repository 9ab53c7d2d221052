"""Who trains in `h100.py`: ours, Megatron-core's own pieces, transformers. One stands in memory at a time."""

import copy
import dataclasses
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from h100_peaks import synchronize
from h100_slice import section
from learner import BareMegatron, Row
from paired import seconds
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_r1.config.sections import OptimSection
from megatron_r1.loss.cross_entropy import CrossEntropy
from megatron_r1.model.build import BuiltModel, build_model
from megatron_r1.model.parallel import device
from megatron_r1.model.trainable import Trainable
from megatron_r1.optim.optimizer import make_trainable
from megatron_r1.train.batch import from_rows
from megatron_r1.train.policy import Policy

OPTIM = OptimSection(lr=1e-4, weight_decay=0.1)
UPDATES = 1000
"""Length of the schedule; more than are made."""
FP8 = {"recipe": "blockwise"}


class Learner(Protocol):
    """Holds a model and a batch."""

    trainable: Trainable | None
    """Of one that Megatron trains."""

    def step(self) -> None:
        """One update."""

    def score(self) -> None:
        """Log-probabilities of the labels, without gradients."""


class Ours:
    """`Policy`."""

    def __init__(self, folder: Path, batch: list[Row], **changes: Any) -> None:
        length = batch[0][0].size(1)
        self.policy = Policy(build_model(section(folder, **changes), length), OPTIM, UPDATES)
        self.trainable: Trainable | None = self.policy.trainable
        self.batch = [from_rows(tokens, labels, len(batch) * length) for tokens, labels in batch]

    def step(self) -> None:
        self.policy.step(self.batch, CrossEntropy())

    def score(self) -> None:
        self.policy.logprobs(self.batch)


class Megatron:
    """Megatron-core's GPTModel of its own Transformer Engine spec, its wrapper, schedule and optimizer in a loop.

    Where there is no Transformer Engine, of our spec: its own cannot build multi-latent attention without.
    """

    def __init__(self, folder: Path, batch: list[Row], **changes: Any) -> None:
        built = build_model(section(folder, **changes), batch[0][0].size(1))
        if built.kernels.fused:
            built = dataclasses.replace(built, chunks=[published(built, batch[0][0].size(1))])
        self.trainable: Trainable | None = make_trainable(built, OPTIM, UPDATES)
        self.loop, self.batch = BareMegatron(built, self.trainable), batch

    def step(self) -> None:
        self.loop.step(self.batch)

    def score(self) -> None:
        raise SystemExit("log-probabilities are compared with transformers")


def published(built: BuiltModel, length: int) -> torch.nn.Module:
    """The same model, with the same kernels and numbers, of the spec that Megatron-core publishes."""
    # Here, because on CPU megatron_r1.model must have prepared Megatron before anything imports it.
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    config = copy.copy(built.config)  # its own: training writes into it
    model: torch.nn.Module = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_decoder_block_spec(config, use_transformer_engine=True),
        vocab_size=built.hf["vocab_size"],
        max_sequence_length=length,
        position_embedding_type="none",  # multi-latent attention makes its own
    )
    return model.to(device())


class Transformers:
    """`AutoModelForCausalLM` in bfloat16 with torch's fused AdamW, which keeps its moments in bfloat16, too."""

    def __init__(self, folder: Path, batch: list[Row]) -> None:
        config = AutoConfig.from_pretrained(folder)
        with device():  # a processor would take minutes to draw billions of numbers
            self.model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        self.trainable: Trainable | None = None
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=OPTIM.lr, fused=True)
        self.batch = batch

    def step(self) -> None:
        for tokens, labels in self.batch:
            logits = self.model(tokens, use_cache=False).logits
            (F.cross_entropy(logits.float().flatten(0, 1), labels.flatten()) / len(self.batch)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIM.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def score(self) -> None:
        for tokens, labels in self.batch:
            logits = self.model(tokens, use_cache=False).logits
            logits.float().log_softmax(-1).gather(-1, labels[..., None])


class Stage:
    """Holds one learner at a time: each gets the whole device.

    Args:
        steps: that are timed together.
        tokens: of one step.
    """

    def __init__(self, steps: int, tokens: int) -> None:
        self.steps, self.tokens = steps, tokens
        self._name: str | None = None
        self._learner: Learner | None = None

    def speed(self, name: str, make: Callable[[], Learner], what: str) -> Callable[[], float]:
        """What measures tokens/s of `what`, "step" or "score", of a learner that is made when it is not there."""

        def figure() -> float:
            work = getattr(self._take(name, make), what)
            work()
            synchronize()
            elapsed = _seconds(lambda: [work() for _ in range(self.steps)])
            return self.steps * self.tokens / elapsed

        return figure

    def clear(self) -> None:
        """Let go of who is there."""
        if self._learner and self._learner.trainable:
            for tensor in memory(self._learner.trainable):
                tensor.untyped_storage().resize_(0)
        self._learner = self._name = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _take(self, name: str, make: Callable[[], Learner]) -> Learner:
        if self._learner is None or self._name != name:
            self.clear()
            self._learner, self._name = make(), name
        return self._learner


def memory(trainable: Trainable) -> Iterator[torch.Tensor]:
    """All that lasts from step to step.

    It is given back tensor by tensor, since objects may stay: Megatron's dispatchers keep the last routing with its
    graph, that ends in C++ at hooks of the parameters, and Python's collector does not see such a cycle.
    """
    for chunk in trainable.chunks:
        yield from chunk.parameters()
    for ddp in trainable.ddp:
        for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers):
            yield from filter(torch.is_tensor, (buffer.param_data, buffer.grad_data))
    for part in trainable.optimizer.chained_optimizers:
        for main, values in part.optimizer.state.items():
            yield from filter(torch.is_tensor, (main, *values.values()))


def _seconds(work: Callable[[], object]) -> float:
    def finished() -> None:
        work()
        synchronize()

    return seconds(finished)


def batch(vocabulary: int, rows: int, length: int) -> list[Row]:
    """Rows of random tokens and their labels, a microbatch each."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(3, vocabulary, (rows, 1, length + 1), generator=generator).to(device())
    return [(text[:, :-1].contiguous(), text[:, 1:].contiguous()) for text in drawn]
