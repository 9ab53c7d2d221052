"""Models being trained, as the loops see them: `Policy` - log-probabilities out, updates in - and its base.

Microbatching, data parallelism and Megatron's forward/backward schedules live here.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from megatron_r1.config.sections import OptimSection
from megatron_r1.errors import NumericsError
from megatron_r1.loss.base import Loss, Metrics
from megatron_r1.model.build import BuiltModel
from megatron_r1.model.logits import LogitsObserver
from megatron_r1.optim.optimizer import make_trainable
from megatron_r1.train.batch import MicroBatch, Minibatch

Figures = dict[str, float]


class TrainedModel:
    """A Megatron model with its optimizer: what it says of the selected tokens, and updates.

    Args:
        model: built, weights loaded.
        optim: the run's [optim].
        updates: optimizer updates of the whole run.
    """

    def __init__(self, model: BuiltModel, optim: OptimSection, updates: int) -> None:
        self.model = model
        self.trainable = make_trainable(model, optim, updates)
        _make_moments(self.trainable.optimizer)
        self.ranks = parallel_state.get_data_parallel_world_size()
        self.rank = parallel_state.get_data_parallel_rank()
        self._schedule = get_forward_backward_func()
        config = model.module.config
        config.grad_scale_func = self.trainable.optimizer.scale_loss
        config.finalize_model_grads_func = finalize_model_grads
        config.no_sync_func = self.trainable.ddp.no_sync

    def read(self, output: torch.Tensor) -> torch.Tensor:
        """What the losses get, from what the module gives. `[rows, seq]` both."""
        return output

    @torch.no_grad()
    def outputs(self, minibatch: Minibatch) -> list[torch.Tensor]:
        """What the model says of every selected token. One `[selected]` tensor a microbatch."""
        outputs = self._run(minibatch, lambda said, micro: (said.sum() * 0, {"said": said.clone()}))
        return [output["said"] for output in outputs]

    def step(self, minibatch: Minibatch, loss: Loss) -> Figures:
        """One optimizer update that minimises `loss` over the minibatch of all ranks.

        Returns the loss's own metrics with grad_norm, lr and, where the model trains them, mtp_loss.

        Raises:
            NumericsError: a gradient is not finite.
        """
        ddp, optimizer, scheduler = self.trainable.ddp, self.trainable.optimizer, self.trainable.scheduler
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        # The schedule averages over microbatches and the gradient reduction over ranks; token weights already
        # say each token's share of the global minibatch, so both averages are undone.
        scale = len(minibatch) * self.ranks

        def objective(said: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, Metrics]:
            value, metrics = loss(said, micro.inputs)
            return value * scale, metrics

        outputs = self._run(minibatch, objective, train=True)
        self._refuse_non_finite()
        lr = optimizer.param_groups[0]["lr"]
        _, grad_norm, _ = optimizer.step()
        scheduler.step(1)
        return self._total(outputs) | {"grad_norm": float(grad_norm), "lr": float(lr)} | self._mtp_loss(len(minibatch))

    @torch.no_grad()
    def evaluate(self, minibatch: Minibatch, loss: Loss) -> Figures:
        """The loss's metrics without an update."""

        def objective(said: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, Metrics]:
            value, metrics = loss(said, micro.inputs)
            return value.clone(), metrics  # The schedule divides the value in place.

        return self._total(self._run(minibatch, objective))

    def _run(
        self,
        minibatch: Minibatch,
        objective: Callable[[torch.Tensor, MicroBatch], tuple[torch.Tensor, Metrics]],
        train: bool = False,
    ) -> list[Metrics]:
        """Forward (and backward when training) over all microbatches; returns what `objective` reported for each."""
        ddp = self.trainable.ddp
        ddp.train(train)

        def forward_step(batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            micro = next(batches)
            positions = torch.arange(micro.tokens.size(1), device=micro.tokens.device).expand_as(micro.tokens)
            output = model(micro.tokens, positions, None, labels=micro.labels, packed_seq_params=_packing(micro))
            return output, lambda output: objective(self.read(output).flatten()[micro.selected], micro)

        outputs: list[Metrics] = self._schedule(
            forward_step_func=forward_step,
            data_iterator=iter(minibatch),
            model=[ddp],
            num_microbatches=len(minibatch),
            seq_length=max(micro.tokens.size(1) for micro in minibatch),
            micro_batch_size=minibatch[0].tokens.size(0),
            forward_only=not train,
        )
        return outputs

    def _refuse_non_finite(self) -> None:
        """Raises `NumericsError` on every rank, before any weight changes, if any gradient is not finite."""
        buffers = [*self.trainable.ddp.buffers, *self.trainable.ddp.expert_parallel_buffers]
        total = torch.stack([buffer.grad_data.sum(dtype=torch.float32) for buffer in buffers]).sum()
        dist.all_reduce(total)
        if not torch.isfinite(total):
            raise NumericsError(
                "a gradient is not finite, so the update was refused; the last checkpoint is intact. "
                "Lower lr or clip_grad of [optim] (a critic's: [critic.optim]), or look for the step where grad_norm "
                "began to rise"
            )

    def _total(self, outputs: list[Metrics]) -> Figures:
        """Sum over microbatches and ranks."""
        names = list(outputs[0])
        totals = torch.stack([torch.stack([output[name] for output in outputs]).sum() for name in names])
        dist.all_reduce(totals, group=parallel_state.get_data_parallel_group())
        return dict(zip(names, totals.tolist(), strict=True))

    def _mtp_loss(self, microbatches: int) -> Figures:
        """Mean multi-token-prediction loss of the last update, before its coefficient."""
        if not self.model.module.config.mtp_num_layers:
            return {}
        MTPLossLoggingHelper.reduce_loss_in_tracker()
        value = float(MTPLossLoggingHelper.tracker["values"].mean()) / microbatches
        MTPLossLoggingHelper.clean_loss_in_tracker()
        return {"mtp_loss": value}


class Policy(TrainedModel):
    """A language model that is trained.

    Args:
        model: built, weights loaded.
        optim: the run's [optim].
        updates: optimizer updates of the whole run.
        temperature: log-probabilities are those of the distribution that is sampled at this temperature.
    """

    def __init__(self, model: BuiltModel, optim: OptimSection, updates: int, temperature: float = 1.0) -> None:
        super().__init__(model, optim, updates)
        self.observer = LogitsObserver(model.module, temperature)

    def read(self, output: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the labels; the module gives their cross-entropy."""
        return -output

    def logprobs(self, minibatch: Minibatch) -> list[torch.Tensor]:
        """Log-probability of every selected token, nats. One `[selected]` tensor a microbatch."""
        return self.outputs(minibatch)

    def logprobs_and_entropies(self, minibatch: Minibatch) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """`logprobs`, and the entropy of the distribution that each selected token was drawn from, nats."""
        with self.observer.watching() as entropies:
            logprobs = self.logprobs(minibatch)
        pairs = zip(entropies, minibatch, strict=True)
        return logprobs, [entropy.flatten()[micro.selected] for entropy, micro in pairs]


def _make_moments(optimizer: MegatronOptimizer) -> None:
    """Adam makes its state at the first update; a checkpoint may come before that, in the warm-up of a critic."""
    for adam in optimizer.chained_optimizers:
        adam.init_state_fn(adam.optimizer, adam.config)
        for group in adam.optimizer.param_groups:
            group.setdefault("step", 0)


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
