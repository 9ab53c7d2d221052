"""PPO's second model: what is still to be earned before each token of a response."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch

from megatron_r1.checkpoint.source import weights
from megatron_r1.checkpoint.store import Checkpoints
from megatron_r1.config.runs import CriticSection, RLConfig
from megatron_r1.loss.value import Value
from megatron_r1.model import hf_folder
from megatron_r1.model.build import build_model
from megatron_r1.model.parallel import consumed_by_first_rank
from megatron_r1.train.batch import Minibatch, routed_freely, with_inputs
from megatron_r1.train.policy import Figures
from megatron_r1.train.scorer import Scorer
from megatron_r1.types import Sample


class Critic:
    """The value function of a run, with its optimizer and checkpoints.

    The value before token t is read at the token before it, where the policy predicts token t.

    Args:
        config: the run; `critic` is there.
        section: its [critic].
    """

    def __init__(self, config: RLConfig, section: CriticSection) -> None:
        self._config, self._section = config, section
        model = config.model.model_copy(update={"path": self._path, "mtp_loss_coef": 0.0})
        built = build_model(model, config.rollout.max_model_len, head="scalar", weights=weights(model.path))
        updates = config.steps * config.minibatches * section.epochs
        self.scorer = Scorer(built, section.optim, updates)
        self.loss = Value(Value.Config(value_clip=section.value_clip))
        # Written before the policy's, and one more is kept, so that the policy's latest always finds its critic.
        kept = config.checkpoint.model_copy(update={"keep": config.checkpoint.keep + 1, "asynchronous": False})
        folder, identity = config.output / "checkpoints/critic", {"seed": config.seed}
        self.checkpoints = Checkpoints(folder, kept, identity, self._describe)
        """A step of the run is saved when it has one here, and then the policy's."""

    @property
    def _path(self) -> Path:
        return self._section.path or self._config.model.path

    def values(self, batch: Sequence[Minibatch]) -> list[list[torch.Tensor]]:
        """The value before every selected token. One `[selected]` tensor a microbatch."""
        return [self.scorer.values(routed_freely(minibatch)) for minibatch in batch]

    def step(self, batch: Sequence[Minibatch]) -> Figures:
        """Train on a rollout; returns the mean of each figure over its updates."""
        evened = [self._evened(routed_freely(minibatch)) for minibatch in batch]
        passes = [self.scorer.step(minibatch, self.loss) for _ in range(self._section.epochs) for minibatch in evened]
        figures = {name: fmean(part[name] for part in passes) for name in passes[0]}
        renamed = {"grad_norm": "critic_grad_norm", "lr": "critic_lr"}
        return {renamed.get(name, name): value for name, value in figures.items()}

    def _evened(self, minibatch: Minibatch) -> Minibatch:
        """The minibatch, its tokens weighing what the critic's loss says; they come with the policy loss's weights."""
        total = self.scorer.passes.over_batch(sum(micro.selected.numel() for micro in minibatch))
        [weight] = self.loss.token_weights([total])
        return with_inputs(minibatch, weights=[torch.full_like(micro.inputs.weights, weight) for micro in minibatch])

    def warming(self, step: int) -> bool:
        """Whether only the critic learns in this step: a policy that follows wrong values unlearns."""
        return step < self._section.warmup

    def save(self, done: int) -> None:
        """A checkpoint after `done` steps."""
        self.checkpoints.save(done, self.scorer.trainable, {}, {})

    def load(self, done: int) -> None:
        """Restore the state after `done` steps.

        Raises:
            DataError, ConfigError: as `Checkpoints.load`.
        """
        self.checkpoints.load(done, self.scorer.trainable, {})

    def export(self) -> None:
        """Write the critic as a Hugging Face folder, from which another run's `critic.path` begins."""
        model, config = self.scorer.model, self._config
        consumed_by_first_rank(
            lambda tensors: hf_folder.write(config.output / "critic/hf", model.hf, tensors, *self._sources),
            model.export(getattr(torch, config.model.dtype)),
        )

    def _describe(self, folder: Path) -> None:
        """Write beside weights what model they are of."""
        hf_folder.describe(folder, self.scorer.model.hf, *self._sources)

    @property
    def _sources(self) -> tuple[Path, Path]:
        """Where the tokenizer stands, and other files of the model."""
        return self._config.tokenizer or self._path, self._path


def explained_variance(samples: Sequence[Sample], returns: Sequence[Sequence[float]]) -> float:
    """1 - Var(R - V) / Var(R) over all tokens: 1 for a critic that knows, 0 for one that says the mean always.

    `returns`: [samples][response]
    """
    earned = torch.tensor([number for sample in returns for number in sample])
    said = torch.tensor([value for sample in samples for value in sample.values or []])
    spread = earned.var(correction=0)
    return float(1 - (earned - said).var(correction=0) / spread) if spread else 0.0
