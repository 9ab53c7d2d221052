"""The trainer's side of reinforcement learning: what is updated, and what its losses compare with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_r1.advantage.base import Advantage
from megatron_r1.checkpoint.source import megatron_checkpoint
from megatron_r1.checkpoint.state import WeightSets
from megatron_r1.config import component
from megatron_r1.config.runs import RLConfig
from megatron_r1.data.questions import heldout, texts
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError
from megatron_r1.loss.base import Loss
from megatron_r1.model import hf_folder
from megatron_r1.model.build import build_model, check_tokenizer
from megatron_r1.model.parallel import consumed_by_first_rank
from megatron_r1.report.rollout_figures import heldout_figures
from megatron_r1.report.run import Report
from megatron_r1.report.samples import shown
from megatron_r1.seeds import stream_seed
from megatron_r1.train.ahead import Ahead
from megatron_r1.train.batch import Minibatch, attach, split, trajectories, with_inputs
from megatron_r1.train.collector import Collector
from megatron_r1.train.correction import agreement, corrected
from megatron_r1.train.critic import Critic, explained_variance
from megatron_r1.train.gather import gather
from megatron_r1.train.guard import Judge
from megatron_r1.train.mismatch import logprob_difference, mean_over_ranks
from megatron_r1.train.policy import Figures, Policy
from megatron_r1.train.reference import Reference
from megatron_r1.train.rollouts import Rollouts
from megatron_r1.train.routing_replay import refuse_unfit, refuse_unrecorded, without_replay
from megatron_r1.types import Group, Question


@dataclass
class Learner:
    """What is sampled for, how it is scored into a loss, what is updated."""

    config: RLConfig
    tokenizer: Tokenizer
    policy: Policy
    reference: Reference | None
    """None where neither loss nor advantage needs one."""
    critic: Critic | None
    rollouts: Rollouts | Ahead
    heldout: list[Question]
    advantage: Advantage
    loss: Loss

    @classmethod
    def build(cls, config: RLConfig) -> "Learner":
        """Everything that needs no engine, so that bad input is reported before one starts."""
        _check_servable(config.model.path)
        tokenizer = Tokenizer.load(config.tokenizer or config.model.path)
        model = build_model(config.model, config.rollout.max_model_len, head="vocabulary")
        check_tokenizer(model, tokenizer.vocab_size, tokenizer.eos_id)
        if config.rollout.routing_replay:
            refuse_unfit(model)
        exam = heldout(config.heldout, config.evaluation.questions)
        policy_steps = config.steps - (config.critic.warmup if config.critic else 0)
        policy = Policy(model, config.optim, policy_steps * config.minibatches, config.rollout.temperature)
        loss: Loss = component.build("loss", config.loss)
        advantage: Advantage = component.build("advantage", config.advantage)
        refers = loss.needs_reference or advantage.needs_ref_logprobs
        critic = Critic(config, config.critic) if config.critic else None
        if critic:
            check_tokenizer(critic.scorer.model, tokenizer.vocab_size, tokenizer.eos_id)
        return cls(
            config=config,
            tokenizer=tokenizer,
            policy=policy,
            reference=Reference(policy, config.reference.refresh_every) if refers else None,
            critic=critic,
            rollouts=(Ahead if config.rollout.ahead else Rollouts)(config, exclude=texts(exam)),
            heldout=exam,
            advantage=advantage,
            loss=loss,
        )

    def weight_sets(self) -> WeightSets:
        """What a checkpoint keeps besides the policy."""
        return {"reference": self.reference.weights} if self.reference else {}

    @property
    def on_policy(self) -> bool:
        """Whether nothing needs pi_old before a step's only update, whose own pass then says what it is."""
        config, advantage = self.config, self.advantage
        compared = self.reference or self.critic or config.rollout.ahead or config.correction.kind != "none"
        needy = advantage.needs_values or advantage.needs_ref_logprobs or config.rollout.routing_replay
        return config.minibatches == 1 and not compared and not needy

    def unscored(self, groups: Sequence[Group], step: int) -> tuple[list[Minibatch], Figures]:
        """This rank's minibatches; nothing is known of them yet."""
        config = self.config
        share = self.policy.share(config.tokens_per_microbatch)
        seed = stream_seed("minibatches", config.seed, step)
        if config.rollout.routing_replay:
            refuse_unrecorded(groups, self.policy.model)
        return list(split(trajectories(groups), config.minibatches, seed, self.loss, share)), {}

    def score(self, groups: Sequence[Group], step: int) -> tuple[list[Minibatch], Figures]:
        """The same with log-probabilities under pi_old and pi_ref and values, and what they show."""
        config, policy, (batch, _) = self.config, self.policy, self.unscored(groups, step)
        old, entropies = zip(*(policy.logprobs_and_entropies(minibatch) for minibatch in batch), strict=True)
        batch = _with(batch, old_logprobs=old)
        if self.reference:
            batch = _with(batch, ref_logprobs=self.reference.logprobs(batch))
        if self.critic:
            batch = _with(batch, old_values=self.critic.values(batch))
        entropy = mean_over_ranks([values for minibatch in entropies for values in minibatch])
        figures: Figures = {"entropy": entropy}
        if config.rollout.ahead or config.correction.kind != "none":
            batch, corrections = corrected(batch, config.correction)
            figures |= corrections
        versions = [sample.weight_version for group in groups for sample in group.samples]

        def compare(minibatches: list[Minibatch]) -> Figures:
            ahead = config.rollout.ahead
            return agreement(minibatches, versions, step) if ahead else logprob_difference(minibatches)

        if config.rollout.routing_replay:
            figures |= without_replay(policy, batch[0], compare)
        return batch, compare(batch) | figures

    def estimate(self, groups: Sequence[Group], batch: list[Minibatch], step: int) -> tuple[list[Minibatch], Figures]:
        """The minibatches with advantages of all tokens; with a critic, what it should have said, too."""
        samples = [sample for group in groups for sample in group.samples]
        scored = batch[0][0].inputs.old_logprobs is not None
        ref = self._write_back(batch, groups, step) if scored else []
        self.advantage(groups, ref)
        idle = sum(not any(sample.advantages) for sample in samples) / len(samples)
        figures = {"zero_advantages": idle}
        known = {"advantages": [sample.advantages for sample in samples]}
        if self.critic:
            known["returns"] = self.advantage.returns(groups, ref)
            figures["explained_variance"] = explained_variance(samples, known["returns"])
        return [attach(minibatch, **known) for minibatch in batch], figures

    def update(
        self, minibatch: Minibatch, groups: Sequence[Group], step: int, judge: Judge
    ) -> tuple[Minibatch, Figures, Figures]:
        """The policy's update: the minibatch with pi_old, the update's figures, and those of a missing `score`."""
        if minibatch[0].inputs.old_logprobs is not None:
            return minibatch, self.policy.step(minibatch, self.loss, judge), {}
        figures, old, entropies = self.policy.step_on_policy(minibatch, self.loss, judge)
        minibatch = with_inputs(minibatch, old_logprobs=old)
        self._write_back([minibatch], groups, step)
        return minibatch, figures, {"entropy": mean_over_ranks(entropies)} | logprob_difference([minibatch])

    def _write_back(self, batch: list[Minibatch], groups: Sequence[Group], step: int) -> list[list[float]]:
        """What the ranks computed, into the samples that need it; returns the reference's log-probabilities.

        An estimator that needs log-probabilities or values needs those of all samples. Else in several processes only
        those come to the first rank that the report shows.
        """
        needy = self.advantage.needs_values or self.advantage.needs_ref_logprobs
        samples = [sample for group in groups for sample in group.samples]
        everything = range(len(samples))
        wanted = everything if needy or self.policy.ranks == 1 else _reported(groups, step)
        for number, values in gather(batch, _inputs(batch, "old_logprobs"), wanted).items():
            samples[number].trainer_logprobs = values
        if self.advantage.needs_values:
            for number, values in gather(batch, _inputs(batch, "old_values"), everything).items():
                samples[number].values = values
        if not self.advantage.needs_ref_logprobs:
            return []
        found = gather(batch, _inputs(batch, "ref_logprobs"), everything)
        return [found[number] for number in everything]

    def evaluate(self, collector: Collector, report: Report, step: int) -> Figures:
        """Held-out questions, answered by the policy as it is after `step` steps."""
        section = self.config.evaluation
        groups = collector.collect(self.heldout, section.samples, stream_seed("evaluation"), section.temperature)
        figures = heldout_figures(groups)
        report.evaluation(step, figures)
        if step in (0, self.config.steps):
            report.samples(step, groups, "after" if step else "before")
        return figures

    def export(self) -> Any:
        """The policy's weights under their Hugging Face names."""
        return self.policy.model.export(getattr(torch, self.config.model.dtype))

    def save_models(self) -> None:
        """Write the trained model, and the critic, as Hugging Face folders."""
        folder, hf = self.config.output / "hf", self.policy.model.hf
        consumed_by_first_rank(lambda tensors: hf_folder.write(folder, hf, tensors, *self._sources), self.export())
        if self.critic:
            self.critic.export()

    def describe(self, folder: Path) -> None:
        """Write beside the policy's weights what model they are of."""
        hf_folder.describe(folder, self.policy.model.hf, *self._sources)

    @property
    def _sources(self) -> tuple[Path, Path]:
        """Where the tokenizer stands, and other files of the model."""
        return self.config.tokenizer or self.config.model.path, self.config.model.path


def _with(batch: Sequence[Minibatch], **values: Sequence[Sequence[torch.Tensor]]) -> list[Minibatch]:
    """`with_inputs` for every minibatch. Field -> [minibatches][microbatches] tensors."""
    parts = [dict(zip(values, lists, strict=True)) for lists in zip(*values.values(), strict=True)]
    return [with_inputs(minibatch, **part) for minibatch, part in zip(batch, parts, strict=True)]


def _inputs(batch: Sequence[Minibatch], field: str) -> list[list[torch.Tensor]]:
    """One field of all `LossInputs`. [minibatches][microbatches]"""
    return [[getattr(micro.inputs, field) for micro in minibatch] for minibatch in batch]


def _reported(groups: Sequence[Group], step: int) -> range:
    """Numbers of the samples of the group that the report shows."""
    number = shown(groups, step)
    before = sum(len(group.samples) for group in groups[:number])
    return range(before, before + len(groups[number].samples))


def _check_servable(folder: Path) -> None:
    """Engines and learner start from the same folder.

    Raises:
        ConfigError: engines cannot load it, or would hold its weights in other numbers than they are sent.
    """
    if megatron_checkpoint(folder):
        raise ConfigError(
            f"{folder} is a Megatron checkpoint, which the rollout engines cannot load: make a Hugging Face folder of "
            "it with `megatron-r1 export` and name that one as model.path"
        )
    if hf_folder.read_config(folder).get(hf_folder.QUANTIZATION):
        raise ConfigError(
            f"{folder} holds quantised weights, the learner sends its own unquantised: make a folder of bfloat16 with "
            "`megatron-r1 cast` and name that one as model.path (engines may have this one: rollout.fp8_path)"
        )
