"""What a model's routers are told of a row: its tokens and not its padding, its sequences one by one, chosen experts.

megatron-core 0.16.1 takes a packed row for one sequence, so its balance loss would depend on what is packed together;
under sequence and context parallelism with losses summed over tokens it makes the loss smaller by their sizes
(router.py:456); and its padding mask neither fits the selection bias (router.py:542) nor reaches MTP layers.
"""

import contextlib
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter

from megatron_r1.compat.megatron_specs import layer_of
from megatron_r1.model.replay import differing, direct

_LOSS = "seq_aux_loss"
PADDING = -1
"""Number of the sequence that a position without a token belongs to."""


@dataclass(frozen=True)
class _Row:
    """What routers are told of one microbatch, of the positions that this rank's routers see."""

    sequences: torch.Tensor
    """[positions]"""
    experts: torch.Tensor | None
    """[positions, layers, experts a token]"""

    @property
    def held(self) -> torch.Tensor:
        """Where tokens stand. [positions]"""
        return self.sequences != PADDING


class Routing:
    """Tells all routers of a model which sequence each position of a forward pass belongs to, and which experts to use.

    Args:
        chunks: the model.
    """

    def __init__(self, chunks: Sequence[GPTModel]) -> None:
        self._row: _Row | None = None
        self._here: torch.Tensor | None = None
        self._told: torch.Tensor | None = None
        self._differing: dict[int, list[torch.Tensor]] | None = None
        for module in (module for chunk in chunks for module in chunk.modules()):
            if isinstance(module, TopKRouter):
                module.register_forward_pre_hook(partial(self._arrive, deque()))
                module.register_forward_hook(self._leave)
                vars(module)["_apply_seq_aux_loss"] = partial(self._balance, module)
                vars(module)["_apply_expert_bias"] = partial(self._count, module)

    @contextlib.contextmanager
    def of(self, sequences: torch.Tensor, experts: torch.Tensor | None = None) -> Iterator[None]:
        """For the forward passes inside.

        Args:
            sequences: number of each position's sequence, `PADDING` where no token stands, of the tokens that the
                context-parallel rank holds. [rows, seq]
            experts: where these tokens go in each layer of the trunk; None = where routers send them.
                [rows, seq, layers, experts a token]
        """
        self.follow(sequences, experts)
        try:
            yield
        finally:
            self.follow(None)

    def follow(self, sequences: torch.Tensor | None, experts: torch.Tensor | None = None) -> None:
        """For all forward passes until the next call: where a schedule takes layers apart, they come after it.

        Args:
            sequences: as of `of`; None = none is under way.
            experts: as of `of`.
        """
        mine = None if experts is None else self.mine(experts)
        self._row = None if sequences is None else _Row(self.mine(sequences), mine)

    @contextlib.contextmanager
    def compared(self) -> Iterator[dict[int, list[torch.Tensor]]]:
        """Routers choose for themselves inside, whatever they are told.

        Yields:
            Number of each layer with experts that this rank holds -> where it chose others than it was told, of each
            microbatch that it was told them of. [microbatches][positions]
        """
        self._differing = defaultdict(list)
        try:
            yield self._differing
        finally:
            self._differing = None

    def held(self) -> torch.Tensor | None:
        """Where the router at work has tokens and not padding; None = everywhere. [positions]"""
        return None if self._here is None else self._here != PADDING

    @staticmethod
    def mine(row: torch.Tensor) -> torch.Tensor:
        """What this rank's routers see, as they see it. [rows, seq, ...] -> [positions, ...]"""
        ranks = parallel_state.get_tensor_model_parallel_world_size()  # sequence parallelism deals the positions
        return row.transpose(0, 1).chunk(ranks)[parallel_state.get_tensor_model_parallel_rank()].flatten(0, 1)

    def _arrive(self, waiting: deque[_Row], router: Any, inputs: Any) -> None:
        """A router is about to route.

        Where activations are recomputed, the first pass is without gradients and the second comes in the backward pass:
        microbatches go back in the order in which they came.
        """
        row = self._row
        if router.training and row is not None and not torch.is_grad_enabled():
            waiting.append(row)
        elif row is None and waiting:
            row = waiting.popleft()
        self._here = None if row is None else row.sequences
        experts, held = (None, torch.empty(0)) if row is None else (row.experts, row.held)
        self._told = direct(router, experts, held, replay=self._differing is None)

    def _leave(self, router: Any, inputs: Any, output: Any) -> None:
        """A router has routed."""
        if self._differing is not None and self._told is not None and self._here is not None:
            self._differing[layer_of(router)].append(differing(router, self._told, self._here != PADDING))

    def _count(self, router: Any, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None) -> None:
        """Tokens of each expert, which the selection bias follows (DeepSeek-V3, arXiv 2412.19437, 2.1.2)."""
        if router.enable_expert_bias and torch.is_grad_enabled():
            with torch.no_grad():
                tokens = routing_map if self._here is None else routing_map & (self._here != PADDING)[:, None]
                router.local_tokens_per_expert += tokens.sum(dim=0)

    def _balance(
        self,
        router: Any,
        probs: torch.Tensor,
        scores_for_aux_loss: torch.Tensor,
        routing_map: torch.Tensor,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        """Attach the sequence-wise balance loss, each sequence weighing as many tokens as it has.

        alpha sum_i f_i P_i, f_i = N_r / (K_r T) sum_t 1(token t selects expert i), P_i = 1/T sum_t s'_{i,t}
        (DeepSeek-V3, eq. 17-20). Its gradient is a sum over tokens, as that of the main loss.
        """
        alpha = router.get_aux_loss_coeff(_LOSS)
        sequences = self._here
        if alpha == 0 or not router.training or not torch.is_grad_enabled():
            return probs
        if sequences is None:
            sequences = torch.zeros(len(probs), dtype=torch.long, device=probs.device)
        number = sequences.max().clamp(min=0)
        group = router.tp_cp_group
        if group.size() > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX, group=group)
        held = (sequences != PADDING)[:, None]
        index, size = sequences.clamp(min=0), int(number) + 1
        shape = (size, scores_for_aux_loss.size(1))
        scores = scores_for_aux_loss.new_zeros(shape).index_add(0, index, scores_for_aux_loss * held)
        selected = scores.new_zeros(shape).index_add(0, index, (routing_map & held).to(scores.dtype))
        if group.size() > 1:
            dist.all_reduce(selected, group=group)
        tokens = (selected.sum(1) / router.topk).clamp(min=1)
        loss = alpha * shape[1] / router.topk * (selected * scores).sum(1) / tokens
        attached: torch.Tensor = MoEAuxLossAutoScaler.apply(probs, loss.sum())
        return attached
