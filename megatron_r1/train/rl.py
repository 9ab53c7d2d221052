"""`megatron-r1 rl`: reinforcement learning with verifiable rewards.

::

    questions -> collector: engine.sample, judge -> advantages -> random minibatches
                     ^                                                  |
                sync.push  <-  policy.step(loss)  <-  old and reference log-probabilities
"""

import time
from dataclasses import dataclass
from typing import Any

import torch

from megatron_r1.advantage.base import Advantage
from megatron_r1.checkpoint.store import Checkpoints, WeightSets
from megatron_r1.config import component
from megatron_r1.config.load import dump
from megatron_r1.config.runs import RLConfig
from megatron_r1.data.questions import Questions, heldout, texts
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.loss.base import Loss
from megatron_r1.model import hf_folder
from megatron_r1.model.build import build_model, check_tokenizer, parameter_count
from megatron_r1.model.parallel import device, from_first_rank, initialize, is_first_rank
from megatron_r1.report.rollout_figures import heldout_figures, rollout_figures, throughput
from megatron_r1.report.run import Report
from megatron_r1.seeds import stream_seed
from megatron_r1.train.batch import Minibatch, Share, split, trajectories, with_logprobs
from megatron_r1.train.collector import Collector
from megatron_r1.train.mismatch import logprob_difference, mean_over_ranks, refuse_above
from megatron_r1.train.policy import Figures, Policy
from megatron_r1.train.reference import Reference
from megatron_r1.types import Group, Question


def run(config: RLConfig) -> dict[str, Any]:
    """Train, or go on where the output folder's newest checkpoint stands; ends with an HF export."""
    initialize(config.parallel, config.seed)
    learner = _Learner.build(config)
    checkpoints = Checkpoints(config.output / "checkpoints", config.checkpoint, {"seed": config.seed})
    start = checkpoints.latest() or 0
    carried = checkpoints.load(start, learner.policy.trainable, learner.weight_sets()) if start else {}
    title, first = config.report.title or "Reinforcement learning", is_first_rank()
    report = Report(config.output, config.report, title, config.steps, dump(config), start, enabled=first)
    with report, Collector(config, learner.tokenizer, report) as collector:
        report.message(_batch_arithmetic(config, parameter_count(learner.policy.model.module)))
        collector.push(learner.export(), version=start)
        if not start:
            carried = {f"{name}_base": value for name, value in learner.evaluate(collector, report, 0).items()}
        earlier = dict(carried)
        for step in range(start, config.steps):
            done = step + 1
            if step and config.evaluation.every and step % config.evaluation.every == 0:
                learner.evaluate(collector, report, step)
            with report.step(step):
                tick = time.perf_counter()
                groups = collector.collect(*learner.draw(step))  # {o_i} ~ pi_old(.|q), r_i
                report.add(rollout_figures(groups) | throughput(groups, time.perf_counter() - tick))
                learner.estimate(groups)  # A_i = (r_i - mean) / std
                with report.phase("logprobs"):
                    batch, figures = learner.prepare(groups, step)
                if step == start:
                    report.message(refuse_above(config.logprob_bound, figures))
                carried = _with_mean_difference(carried, figures, step)
                with report.phase("update"):
                    for minibatch in batch:
                        report.add(learner.policy.step(minibatch, learner.loss))  # ascend J_GRPO
                collector.push(learner.export(), version=done)  # pi_old <- pi_theta
                if learner.reference and learner.reference.refresh(done):
                    report.message(f"reference := policy after step {done}")
                report.add(figures)
                counters = {name: earlier.get(name, 0.0) + count for name, count in collector.counters.items()}
                report.set(counters)
                carried |= counters
            report.samples(step, groups[:1], "train")
            if checkpoints.due(done, config.steps):
                with report.phase("checkpoint"):
                    checkpoints.save(done, learner.policy.trainable, learner.weight_sets(), carried)
        final = {f"{name}_final": value for name, value in learner.evaluate(collector, report, config.steps).items()}
        learner.save_model()
        return report.summary(_summary(config, carried | final))


@dataclass
class _Learner:
    """The trainer's side: what is sampled for, how it is scored into a loss, what is updated."""

    config: RLConfig
    tokenizer: Tokenizer
    policy: Policy
    reference: Reference | None
    """None where the loss needs none."""
    questions: Questions
    heldout: list[Question]
    estimate: Advantage
    loss: Loss

    @classmethod
    def build(cls, config: RLConfig) -> "_Learner":
        """Everything that needs no engine, so that bad input is reported before one starts."""
        tokenizer = Tokenizer.load(config.tokenizer or config.model.path)
        model = build_model(config.model, config.rollout.max_model_len)
        check_tokenizer(model, tokenizer.vocab_size, tokenizer.eos_id)
        exam = heldout(config.heldout, config.evaluation.questions)
        policy = Policy(model, config.optim, config.steps * config.minibatches, config.rollout.temperature)
        loss: Loss = component.build("loss", config.loss)
        return cls(
            config=config,
            tokenizer=tokenizer,
            policy=policy,
            reference=Reference(policy, config.reference.refresh_every) if loss.needs_reference else None,
            questions=Questions(config.data, config.seed, exclude=texts(exam)),
            heldout=exam,
            estimate=component.build("advantage", config.advantage),
            loss=loss,
        )

    def weight_sets(self) -> WeightSets:
        """What a checkpoint keeps besides the policy."""
        return {"reference": self.reference.weights} if self.reference else {}

    def draw(self, step: int) -> tuple[list[Question], int, int]:
        """Questions, group size and seed of a step's rollout."""
        questions = self.questions.take(step, self.config.questions)
        return questions, self.config.group_size, stream_seed("rollout", self.config.seed, step)

    def prepare(self, groups: list[Group], step: int) -> tuple[list[Minibatch], Figures]:
        """This rank's minibatches with old and reference log-probabilities, and what these show."""
        config, policy = self.config, self.policy
        share = Share(policy.rank, policy.ranks, config.tokens_per_microbatch, device())
        seed = stream_seed("minibatches", config.seed, step)
        batch = list(split(trajectories(groups), config.minibatches, seed, self.loss, share))
        old, entropies = zip(*(policy.logprobs_and_entropies(minibatch) for minibatch in batch), strict=True)
        ref = self.reference.logprobs(batch) if self.reference else [None] * len(batch)
        batch = [with_logprobs(*parts) for parts in zip(batch, old, ref, strict=True)]
        entropy = mean_over_ranks([values for minibatch in entropies for values in minibatch])
        return batch, logprob_difference(batch) | {"entropy": entropy}

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
        return self.policy.model.map.export(self.policy.model.module, getattr(torch, self.config.model.dtype))

    def save_model(self) -> None:
        """Write the trained model as a Hugging Face folder."""
        folder, hf, base = self.config.output / "hf", self.policy.model.hf, self.config.model.path
        from_first_rank(lambda: hf_folder.write(folder, hf, self.export(), self.config.tokenizer or base, base))


def _with_mean_difference(carried: Figures, figures: Figures, step: int) -> Figures:
    """The mean over all steps so far of the log-probability difference, kept with what a resumed run needs."""
    name = "logprob_difference_mean"
    before = carried.get(name, 0.0)
    return carried | {name: before + (figures[name] - before) / (step + 1)}


def _batch_arithmetic(config: RLConfig, parameters: int) -> str:
    samples = config.questions * config.group_size
    return (
        f"{parameters:,} parameters; a step is {config.questions} questions x {config.group_size} samples = {samples} "
        f"samples = {config.minibatches} updates of {samples // config.minibatches}"
    )


def _summary(config: RLConfig, figures: Figures) -> dict[str, Any]:
    short = {name.replace("heldout_format", "format_rate"): value for name, value in figures.items()}
    return {
        "model": str(config.output / "hf"),
        "steps": config.steps,
        "updates": config.steps * config.minibatches,
        "samples": config.steps * config.questions * config.group_size,
        **short,
    }
