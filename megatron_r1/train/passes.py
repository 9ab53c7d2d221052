"""Forward and backward passes of a minibatch, however the model, the sequences and the batch are cut over ranks.

Megatron's schedules, microbatching, pipeline stages and context parallelism live here: what calls this sees whole rows,
and every rank gets the same figures.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from megatron_r1.compat.megatron_specs import mtp_means
from megatron_r1.errors import ConfigError
from megatron_r1.loss.base import Metrics
from megatron_r1.model import context
from megatron_r1.model.build import BuiltModel
from megatron_r1.model.kernels import FP8_UNIT
from megatron_r1.model.logits import LogitsObserver
from megatron_r1.model.parallel import device
from megatron_r1.model.routing import PADDING, Routing
from megatron_r1.model.trainable import Trainable
from megatron_r1.train.batch import MicroBatch, Minibatch
from megatron_r1.train.layout import Alignment

T = TypeVar("T")
Objective = Callable[[torch.Tensor, MicroBatch], tuple[torch.Tensor, T]]
"""What the model gives for a microbatch -> the value to minimise, and anything that is wanted of it."""


class Passes:
    """Runs a model over minibatches.

    Args:
        model: whose it is.
        trainable: the same, ready to be trained.
    """

    def __init__(self, model: BuiltModel, trainable: Trainable) -> None:
        self._ddp, self._config = trainable.ddp, model.config
        self._schedule = get_forward_backward_func()
        self._routing = Routing(model.chunks) if model.config.num_moe_experts else None
        stages, cuts = parallel_state.get_pipeline_model_parallel_world_size(), context.size()
        sequence = 2 * cuts if cuts > 1 else 1
        part = FP8_UNIT[model.kernels.fp8.recipe] if model.kernels.fp8 else 1
        self.alignment = Alignment(
            sequence, math.lcm(part * cuts * parallel_state.get_tensor_model_parallel_world_size(), sequence)
        )
        self._recorded = model.kernels.options["cuda_graphs"] != "none"
        # The interleaved schedule takes microbatches in groups. Between two ranks that are each other's next and
        # previous megatron-core 0.16.1 confuses the two shapes that it announces (p2p_communication.py:205): no two
        # may differ.
        self.equal = len(self._ddp) > 1
        self.multiple = stages if self.equal else 1
        model.config.variable_seq_lengths = not self.equal
        self.head: LogitsObserver | None = None
        """Of a language model whose logits are computed where they count alone."""
        # Context and sequence parallelism cut rows before the head; the MTP loss, FP8's tiles and plans of layers'
        # parts count on whole ones.
        self.whole_rows = cuts == 1 and not (
            model.config.sequence_parallel
            or model.config.mtp_num_layers
            or model.kernels.fp8
            or model.config.overlap_moe_expert_parallel_comm
        )
        """Whether the head of a stage sees whole rows, and nothing else counts on what it gives."""
        syncs: list[Any] = [ddp.no_sync for ddp in self._ddp]
        model.config.grad_scale_func = trainable.optimizer.scale_loss
        model.config.finalize_model_grads_func = finalize_model_grads
        model.config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
        if (kept := mtp_means(MTPLossLoggingHelper.tracker)) is not None:
            kept.zero_()  # of another model of this process, which Megatron does not tell apart

    def run(self, minibatch: Minibatch, objective: Objective[T], train: bool = False) -> list[T]:
        """Forward, and backward when training, over all microbatches of this rank.

        Returns:
            What `objective` reported for each; nothing where the last pipeline stage is another rank's.
        """
        for ddp in self._ddp:
            ddp.train(train)

        def forward_step(
            batches: Iterator[MicroBatch], model: torch.nn.Module, return_schedule_plan: bool = False
        ) -> tuple[Any, Any]:
            micro = next(batches)
            forward = self._planned if return_schedule_plan else self._forward
            return forward(micro, model), partial(self._valued, micro=micro, objective=objective)

        outputs: list[T] = self._schedule(
            forward_step_func=forward_step,
            data_iterator=[iter(minibatch) for _ in self._ddp] if len(self._ddp) > 1 else iter(minibatch),
            model=self._ddp,
            num_microbatches=len(minibatch),
            seq_length=max(micro.tokens.size(1) for micro in minibatch),
            micro_batch_size=minibatch[0].tokens.size(0),
            forward_only=not train,
        )
        if self._routing:
            self._routing.follow(None)
        return outputs

    def held(self) -> torch.Tensor | None:
        """See `Routing.held`."""
        return self._routing.held() if self._routing else None

    def rerouted(self, minibatch: Minibatch, objective: Objective[T]) -> tuple[list[T], list[torch.Tensor]]:
        """A forward pass in which routers choose for themselves.

        Returns:
            What `objective` reported, as `run`; and of each microbatch that says where its tokens go, whether those
            that this rank's routers see go elsewhere. [layers that this rank holds, tokens]
        """
        assert self._routing is not None
        with self._routing.compared() as found:
            reports = self.run(minibatch, objective)
        elsewhere = []
        for number, micro in enumerate(micro for micro in minibatch if micro.routed_experts is not None):
            held = self._routing.mine(self._inputs(micro)[1]) != PADDING
            layers = [layer[number][held] for layer in found.values()]
            elsewhere.append(torch.stack(layers) if layers else held.new_zeros(0, int(held.sum())))
        return reports, elsewhere

    def row(self, output: torch.Tensor, micro: MicroBatch) -> torch.Tensor:
        """The whole rows that context-parallel ranks hold parts of. [rows, seq]"""
        return context.whole(output, _ends(micro), 1, summed=False) if context.size() > 1 else output

    def selected(self, output: torch.Tensor, micro: MicroBatch) -> torch.Tensor:
        """What the model gives for the positions that count. `[rows, seq]`, or `[1, selected]` -> `[selected]`"""
        return output.flatten() if self._narrow(micro) else self.row(output, micro).flatten()[micro.selected]

    def tokens(self, minibatch: Minibatch) -> int:
        """Tokens of the minibatch over all ranks."""
        return self.over_batch(sum(micro.count for micro in minibatch))

    def over_batch(self, count: int) -> int:
        """The sum over the ranks that hold other parts of a batch."""
        total = torch.tensor(count, device=device())
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        return int(total)

    def tensors(self, found: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        """Float32 tensors that the last pipeline stage has, on all stages. `sizes`: numbers in each."""
        flat = torch.cat(list(found)) if found else torch.empty(sum(sizes), device=device())
        _from_last_stage(flat)
        return list(flat.split(list(sizes)))

    def any_stage(self, numbers: torch.Tensor) -> None:
        """The largest of all pipeline stages, in place."""
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=parallel_state.get_pipeline_model_parallel_group())

    def total(self, outputs: Sequence[Metrics]) -> dict[str, float]:
        """Sums over the microbatches of all ranks."""
        figures: list[dict[str, float]] = [{}]
        if outputs:
            names = list(outputs[0])
            totals = torch.stack([torch.stack([output[name] for output in outputs]).sum() for name in names])
            dist.all_reduce(totals, group=parallel_state.get_data_parallel_group())
            figures = [dict(zip(names, totals.tolist(), strict=True))]
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            source = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast_object_list(figures, source, group=parallel_state.get_pipeline_model_parallel_group())
        return figures[0]

    def mtp_loss(self, micro: MicroBatch) -> Metrics:
        """Sum of the multi-token-prediction loss of the microbatch that has just gone forward, and of how many tokens.

        Megatron keeps the mean of this rank's part; where that has no token it is not a number.
        """
        if not self._config.mtp_num_layers or (kept := mtp_means(MTPLossLoggingHelper.tracker)) is None:
            return {}
        means = kept.clone()
        kept.zero_()
        real, ends = _real(micro), _ends(micro)
        values = means.new_zeros(2)
        for mean in means:
            real = real.roll(-1, dims=1)
            real[:, ends[1:].long() - 1] = False
            count = (real[:, context.positions(ends)] if context.size() > 1 else real).sum()
            values += torch.stack([torch.where(count > 0, mean * count, torch.zeros_like(mean)), count])
        if context.size() > 1:
            dist.all_reduce(values, group=parallel_state.get_context_parallel_group())
        return {"mtp_loss": values[0], "mtp_tokens": values[1]}

    def _forward(self, micro: MicroBatch, model: torch.nn.Module) -> torch.Tensor:
        inputs, sequences = self._inputs(micro)
        with contextlib.ExitStack() as stack:
            if self._routing:
                stack.enter_context(self._routing.of(sequences, _experts(micro)))
            if self.head and self._narrow(micro):
                stack.enter_context(self.head.only(micro.selected))
                inputs["labels"] = micro.labels[:, micro.selected]
            output: torch.Tensor = model(**inputs)
        return output

    def _narrow(self, micro: MicroBatch) -> bool:
        """Whether logits are computed where they count alone."""
        return self.head is not None and micro.tokens.size(0) == 1 and 0 < micro.selected.numel() < micro.tokens.numel()

    def _planned(self, micro: MicroBatch, model: Any) -> Any:
        """The forward pass as a plan of its layers' parts, which Megatron mixes with another's backward pass."""
        if micro.ends is not None and self._config.mtp_num_layers:
            raise ConfigError(
                "model.kernels.overlap_expert_exchange does not know packed sequences with an MTP layer: leave it out, "
                "or write mtp_loss_coef = 0"
            )
        inputs, sequences = self._inputs(micro)
        if self._routing:
            self._routing.follow(sequences, _experts(micro))
        return model.build_schedule_plan(**inputs)

    def _inputs(self, micro: MicroBatch) -> tuple[dict[str, Any], torch.Tensor]:
        """Arguments of GPTModel, and the sequence of each position, of this context-parallel rank's tokens."""
        if self._recorded and micro.ends is not None:
            raise ConfigError(
                'model.kernels.cuda_graphs = "local" records rows of one length, but this run packs sequences: leave '
                "it out"
            )
        tokens, labels, padding, sequences = micro.tokens, micro.labels, micro.padding, _sequences(micro)
        places = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
        if context.size() > 1:
            own = context.positions(_ends(micro))
            tokens, labels, places = tokens[:, own], labels[:, own], places[:, own]
            padding = None if padding is None else padding[:, own]
            sequences = sequences[:, own]
        inputs: dict[str, Any] = {"input_ids": tokens, "position_ids": places, "attention_mask": None}
        inputs |= {"labels": labels, "packed_seq_params": _packing(micro)}
        if padding is not None:
            inputs["loss_mask"] = (~padding).float()  # of the MTP loss
        return inputs, sequences

    def _valued(
        self, output: torch.Tensor, micro: MicroBatch, objective: Objective[T]
    ) -> tuple[torch.Tensor, torch.Tensor, T]:
        value, report = objective(output, micro)
        counts = micro.count if parallel_state.get_context_parallel_rank() == 0 else 0
        return value, torch.tensor(counts, dtype=torch.int, device=value.device), report


def _from_last_stage(tensor: torch.Tensor) -> None:
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        source = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(tensor, source, group=parallel_state.get_pipeline_model_parallel_group())


def _ends(micro: MicroBatch) -> torch.Tensor:
    """Where the sequences of each row end, 0 first."""
    if micro.ends is not None:
        return micro.ends
    return torch.tensor([0, micro.tokens.size(1)], device=micro.tokens.device)


def _real(micro: MicroBatch) -> torch.Tensor:
    """True where a token stands. [rows, seq]"""
    return torch.ones_like(micro.tokens, dtype=torch.bool) if micro.padding is None else ~micro.padding


def _sequences(micro: MicroBatch) -> torch.Tensor:
    """Number of the sequence that each position belongs to. [rows, seq]"""
    if micro.ends is None:
        rows, length = micro.tokens.shape
        return torch.arange(rows, device=micro.tokens.device)[:, None].expand(rows, length)
    lengths = micro.ends.diff().long()
    numbers = torch.arange(lengths.numel(), device=lengths.device).repeat_interleave(lengths)[None]
    return numbers if micro.padding is None else numbers.masked_fill(micro.padding, PADDING)


def _experts(micro: MicroBatch) -> torch.Tensor | None:
    """Where the tokens of this context-parallel rank go. [rows, seq, layers, experts a token]"""
    if micro.routed_experts is None:
        return None
    experts = micro.routed_experts.to(micro.tokens.device)
    return experts[:, context.positions(_ends(micro))] if context.size() > 1 else experts


def _packing(micro: MicroBatch) -> PackedSeqParams | None:
    if micro.ends is None:
        return None
    longest = int(micro.ends.diff().max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=micro.ends,
        cu_seqlens_kv=micro.ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
