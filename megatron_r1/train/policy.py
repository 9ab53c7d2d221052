"""Models being trained, as the loops see them: `Policy` - log-probabilities out, updates in - and its base."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron_r1.config.sections import OptimSection
from megatron_r1.loss.base import Loss, Metrics
from megatron_r1.model.build import BuiltModel
from megatron_r1.model.logits import LogitsObserver
from megatron_r1.model.parallel import device
from megatron_r1.optim.optimizer import make_trainable
from megatron_r1.optim.schedule import TokensBefore
from megatron_r1.train.batch import MicroBatch, Minibatch, Share
from megatron_r1.train.expert_load import ExpertLoad
from megatron_r1.train.guard import Judge, refuse_non_finite
from megatron_r1.train.passes import Passes

Figures = dict[str, float]


class TrainedModel:
    """A Megatron model with its optimizer: what it says of the selected tokens, and updates.

    Args:
        model: built, weights loaded.
        optim: the run's [optim].
        updates: optimizer updates of the whole run.
        tokens_before: each of them, where the run counts tokens.
    """

    def __init__(
        self, model: BuiltModel, optim: OptimSection, updates: int, tokens_before: TokensBefore | None = None
    ) -> None:
        self.model = model
        self.trainable = make_trainable(model, optim, updates, tokens_before)
        _make_moments(self.trainable.optimizer)
        self.ranks = parallel_state.get_data_parallel_world_size()
        self.rank = parallel_state.get_data_parallel_rank()
        self.passes = Passes(model, self.trainable)
        self._experts = ExpertLoad(model.chunks, self.passes.held)

    def share(self, capacity: int) -> Share:
        """This rank's part of every batch, `capacity` being the tokens of one microbatch."""
        passes = self.passes
        return Share(self.rank, self.ranks, capacity, device(), passes.alignment, passes.multiple, passes.equal)

    def read(self, output: torch.Tensor) -> torch.Tensor:
        """What the losses get, from what the module gives. `[rows, seq]` both."""
        return output

    @torch.no_grad()
    def outputs(self, minibatch: Minibatch) -> list[torch.Tensor]:
        """What the model says of every selected token, float32. One `[selected]` tensor a microbatch."""
        return self._on_all_stages(minibatch, self.passes.run(minibatch, self._said))

    @torch.no_grad()
    def rerouted(self, minibatch: Minibatch) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """`outputs` where routers choose for themselves, and which tokens they send elsewhere: `Passes.rerouted`."""
        said, elsewhere = self.passes.rerouted(minibatch, self._said)
        return self._on_all_stages(minibatch, said), elsewhere

    def step(
        self,
        minibatch: Minibatch,
        loss: Loss,
        judge: Judge = refuse_non_finite,
        said: list[torch.Tensor] | None = None,
    ) -> Figures:
        """One optimizer update that minimises `loss` over the minibatch of all ranks.

        Where `judge` says no to its loss and gradient norm (not a number where a gradient is not finite), nothing
        changes but the schedule, which counts it.

        Args:
            minibatch: this rank's part.
            loss: the objective.
            judge: whether the update is made.
            said: an empty list for a minibatch of the very weights that are updated: gets what `outputs` would have
                given before the update, which counts as `old_logprobs` and costs no pass of its own.

        Returns the loss's own metrics with grad_norm, lr and, where the model trains them, mtp_loss.

        Raises:
            NumericsError: of `judge`.
        """
        optimizer, scheduler = self.trainable.optimizer, self.trainable.scheduler
        for ddp in self.trainable.ddp:
            ddp.zero_grad_buffer()
        optimizer.zero_grad()
        # Megatron divides the gradient by the number of tokens; token weights already say each token's share of the
        # global minibatch, so that is undone. The balance and MTP losses are means over those tokens.
        scale = self.passes.tokens(minibatch)
        biases = self._routing_biases()
        before = [bias.clone() for bias in biases]

        def objective(output: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, Metrics]:
            selected, inputs = self._selected(output, micro), micro.inputs
            if said is not None:
                said.append(selected.detach().float().clone())
                inputs = replace(inputs, old_logprobs=said[-1])
            value, metrics = loss(selected, inputs)
            return value * scale, metrics | self.passes.mtp_loss(micro)

        figures = self.passes.total(self.passes.run(minibatch, objective, train=True))
        if count := figures.pop("mtp_tokens", 0.0):
            figures["mtp_loss"] /= count
        optimizer.prepare_grads()
        grad_norm = float(optimizer.get_grad_norm()) if self._finite() else math.nan
        lr = optimizer.param_groups[0]["lr"]
        if judge(*_agreed(figures.get("loss"), grad_norm)):
            self._update(grad_norm)
        else:
            for bias, value in zip(biases, before, strict=True):
                bias.copy_(value)
        scheduler.step(1)
        return figures | {"grad_norm": grad_norm, "lr": float(lr)} | self._experts.take()

    @torch.no_grad()
    def evaluate(self, minibatch: Minibatch, loss: Loss) -> Figures:
        """The loss's metrics without an update."""

        def objective(output: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, Metrics]:
            value, metrics = loss(self._selected(output, micro), micro.inputs)
            return value.clone(), metrics  # The schedule may change the value in place.

        return self.passes.total(self.passes.run(minibatch, objective))

    def _said(self, output: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        said = self._selected(output, micro)
        return said.sum() * 0, said.float().clone()

    def _on_all_stages(self, minibatch: Minibatch, said: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return self.passes.tensors(said, [micro.selected.numel() for micro in minibatch])

    def _selected(self, output: torch.Tensor, micro: MicroBatch) -> torch.Tensor:
        return self.passes.selected(self.read(output), micro)

    def _update(self, grad_norm: float) -> None:
        """What `ChainedOptimizer.step` does once it knows the gradient norm."""
        optimizer = self.trainable.optimizer
        for part in optimizer.chained_optimizers:
            if not part.is_stub_optimizer and (parameters := part.get_parameters()):
                decoupled = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
                clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, grad_norm, decoupled)
        optimizer.step_with_ready_grads()

    def _routing_biases(self) -> list[torch.Tensor]:
        """What Megatron moves before the gradient norm is known (`finalize_model_grads`)."""
        return [
            buffer
            for chunk in self.trainable.chunks
            for name, buffer in chunk.named_buffers()
            if name.endswith("expert_bias")
        ]

    def _finite(self) -> bool:
        """Whether the gradients of all ranks are, those included that the norm counts on one rank alone."""
        buffers = [buffer for ddp in self.trainable.ddp for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers)]
        total = torch.stack([buffer.grad_data.sum(dtype=torch.float32) for buffer in buffers]).sum()
        dist.all_reduce(total)
        return bool(torch.isfinite(total))


class Policy(TrainedModel):
    """A language model that is trained.

    Args:
        model: built, weights loaded.
        optim: the run's [optim].
        updates: optimizer updates of the whole run.
        temperature: log-probabilities are those of the distribution that is sampled at this temperature.
        tokens_before: each update, where the run counts tokens.
    """

    def __init__(
        self,
        model: BuiltModel,
        optim: OptimSection,
        updates: int,
        temperature: float = 1.0,
        tokens_before: TokensBefore | None = None,
    ) -> None:
        super().__init__(model, optim, updates, tokens_before)
        last = model.chunks[-1]
        self.observer = LogitsObserver(last, temperature) if last.post_process else None
        self.passes.head = self.observer if self.passes.whole_rows else None

    def read(self, output: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the labels; the module gives their cross-entropy."""
        return -output

    def logprobs(self, minibatch: Minibatch) -> list[torch.Tensor]:
        """Log-probability of every selected token, nats. One `[selected]` tensor a microbatch."""
        return self.outputs(minibatch)

    def logprobs_and_entropies(self, minibatch: Minibatch) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """`logprobs`, and the entropy of the distribution that each selected token was drawn from, nats."""
        with self._watched() as entropies:
            logprobs = self.logprobs(minibatch)
        return logprobs, self._of_all_stages(entropies, minibatch)

    def step_on_policy(
        self, minibatch: Minibatch, loss: Loss, judge: Judge
    ) -> tuple[Figures, list[torch.Tensor], list[torch.Tensor]]:
        """`step` of a minibatch that the weights to be updated have sampled, and `logprobs_and_entropies` before it."""
        said: list[torch.Tensor] = []
        with self._watched() as entropies:
            figures = self.step(minibatch, loss, judge, said)
        logprobs = self.passes.tensors(said, [micro.selected.numel() for micro in minibatch])
        return figures, logprobs, self._of_all_stages(entropies, minibatch)

    def _watched(self) -> contextlib.AbstractContextManager[list[torch.Tensor]]:
        return self.observer.watching() if self.observer else contextlib.nullcontext([])

    def _of_all_stages(self, entropies: list[torch.Tensor], minibatch: Minibatch) -> list[torch.Tensor]:
        """Entropies that the last pipeline stage has, of the tokens that count, on all stages."""
        rows = [self.passes.selected(said, micro) for said, micro in zip(entropies, minibatch, strict=False)]
        return self.passes.tensors(rows, [micro.selected.numel() for micro in minibatch])


def _make_moments(optimizer: MegatronOptimizer) -> None:
    """Adam makes its state at the first update; a checkpoint may come before that, in the warm-up of a critic.

    Not where part of it is offloaded: upstream has no function for that.
    """
    for adam in optimizer.chained_optimizers:
        if adam.init_state_fn is None:
            continue
        adam.init_state_fn(adam.optimizer, adam.config)
        for group in adam.optimizer.param_groups:
            group.setdefault("step", 0)


def _agreed(loss: float | None, grad_norm: float) -> tuple[float | None, float]:
    """The first rank's: sums in another order must not let ranks judge differently."""
    figures = torch.tensor([math.nan if loss is None else loss, grad_norm], dtype=torch.float64, device=device())
    dist.broadcast(figures, 0)
    first, second = figures.tolist()
    return (None if loss is None else first), second
