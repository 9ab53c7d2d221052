"""What a model's routers count of a row: its tokens and not its padding, its sequences one by one.

megatron-core 0.16.1 takes a packed row for one sequence, so its balance loss would depend on what is packed together;
under sequence and context parallelism with losses summed over tokens it makes the loss smaller by their sizes
(router.py:456); and its padding mask neither fits the selection bias (router.py:542) nor reaches MTP layers.
"""

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter

_LOSS = "seq_aux_loss"
PADDING = -1
"""Number of the sequence that a position without a token belongs to."""


class Routing:
    """Tells all routers of a model which sequence each position of a forward pass belongs to.

    Args:
        chunks: the model.
    """

    def __init__(self, chunks: Sequence[GPTModel]) -> None:
        self._sequences: torch.Tensor | None = None
        self._here: torch.Tensor | None = None
        for module in (module for chunk in chunks for module in chunk.modules()):
            if isinstance(module, TopKRouter):
                module.register_forward_pre_hook(partial(self._arrive, deque()))
                vars(module)["_apply_seq_aux_loss"] = partial(self._balance, module)
                vars(module)["_apply_expert_bias"] = partial(self._count, module)

    @contextlib.contextmanager
    def of(self, sequences: torch.Tensor) -> Iterator[None]:
        """For the forward passes inside.

        Args:
            sequences: number of each position's sequence, `PADDING` where no token stands, of the tokens that the
                context-parallel rank holds. [rows, seq]
        """
        self._sequences = self._mine(sequences)
        try:
            yield
        finally:
            self._sequences = None

    def follow(self, sequences: torch.Tensor | None) -> None:
        """For all forward passes until the next call: where a schedule takes layers apart, they come after it.

        Args:
            sequences: as of `of`; None = none is under way.
        """
        self._sequences = None if sequences is None else self._mine(sequences)

    def held(self) -> torch.Tensor | None:
        """Where the router at work has tokens and not padding; None = everywhere. [positions]"""
        return None if self._here is None else self._here != PADDING

    @staticmethod
    def _mine(sequences: torch.Tensor) -> torch.Tensor:
        ranks = parallel_state.get_tensor_model_parallel_world_size()  # sequence parallelism deals the positions
        mine = sequences.transpose(0, 1).chunk(ranks)[parallel_state.get_tensor_model_parallel_rank()]
        return mine.reshape(-1)

    def _arrive(self, waiting: deque[torch.Tensor], router: Any, inputs: Any) -> None:
        """A router is about to route.

        Where activations are recomputed, the first pass is without gradients and the second comes in the backward pass:
        microbatches go back in the order in which they came.
        """
        self._here = self._sequences
        if router.training and self._sequences is not None and not torch.is_grad_enabled():
            waiting.append(self._sequences)
        elif self._sequences is None and waiting:
            self._here = waiting.popleft()

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
