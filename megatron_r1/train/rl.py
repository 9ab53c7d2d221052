"""`megatron-r1 rl`: reinforcement learning with verifiable rewards.

::

    questions -> rollouts: engine.sample, judge -> random minibatches -> old and reference log-probabilities, values
                     ^                                                            |
                sync.push  <-  policy.step(loss), critic.step  <-  advantages of all tokens
"""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from megatron_r1.checkpoint.signals import Stopped
from megatron_r1.checkpoint.store import Checkpoints
from megatron_r1.config.load import dump
from megatron_r1.config.runs import RLConfig
from megatron_r1.errors import EngineError
from megatron_r1.model import lora
from megatron_r1.model.parallel import initialize, is_first_rank
from megatron_r1.model.placement import parameter_counts
from megatron_r1.report.rollout_figures import constant_rewards, rollout_figures, throughput
from megatron_r1.report.run import Report
from megatron_r1.report.samples import shown
from megatron_r1.train import memory
from megatron_r1.train.batch import Minibatch, trajectories
from megatron_r1.train.collector import Collector
from megatron_r1.train.guard import Guard
from megatron_r1.train.heartbeat import Heartbeat
from megatron_r1.train.interruption import InterruptionError, Interruptions
from megatron_r1.train.learner import Learner
from megatron_r1.train.memory import in_words, state_bytes
from megatron_r1.train.mismatch import refuse_above
from megatron_r1.train.policy import Figures
from megatron_r1.train.rollouts import IN_FLIGHT, PASS_RATES
from megatron_r1.train.throughput import Throughput
from megatron_r1.types import Group
from megatron_r1.wording import counted

_FIRST_STEPS = 3
"""Steps in which a reward that is the same for all samples is a mistake, and not a task that is learned."""


def run(config: RLConfig) -> dict[str, Any]:
    """Train, or go on where the output folder's newest checkpoint stands; ends with an HF export."""
    initialize(config.parallel, config.seed, config.model.kernels)
    ranks = dist.get_rank(), dist.get_world_size()
    with Heartbeat(config.output, config.guard, *ranks, "megatron-r1 rl") as heartbeat:
        return _Training(config, heartbeat).run()


class _Training:
    """One run: the learner, how far it has come, and what a checkpoint keeps."""

    def __init__(self, config: RLConfig, heartbeat: Heartbeat) -> None:
        self._config = config
        self._learner = Learner.build(config)
        self._checkpoints = Checkpoints(
            config.output / "checkpoints", config.checkpoint, {"seed": config.seed}, self._learner.describe
        )
        critic = self._learner.critic
        self._compared = False
        self._begun = False
        """Questions of a step have been taken that is not done: what is here is of no whole number of steps."""
        self._start = self._done = self._saved = self._checkpoints.latest(*[critic.checkpoints] if critic else []) or 0
        carried = _resume(self._learner, self._checkpoints, self._start) if self._start else {}
        title, first = config.report.title or "Reinforcement learning", is_first_rank()
        self._report = Report(
            config.output, config.report, title, config.steps, dump(config), self._start, first, heartbeat.beat
        )
        self._guard = Guard(config.guard, config.output, dist.get_rank(), self._report.message)
        self._carried = self._guard.restore(carried)
        self._earlier = dict(self._carried)
        self._throughput = Throughput(self._learner.policy.model, dist.get_world_size())

    def run(self) -> dict[str, Any]:
        """All steps.

        Raises:
            Stopped: a signal has asked the run to end; all steps that it has done are saved.
        """
        report, interruptions = self._report, Interruptions()
        collector = Collector(self._config, self._learner.tokenizer, report, interruptions)
        try:
            with report, self._checkpoints.running(report.message), interruptions.heard(), collector:
                return self._train(collector)
        except InterruptionError:
            raise Stopped from None

    def _train(self, collector: Collector) -> dict[str, Any]:
        config, learner, report = self._config, self._learner, self._report
        report.message(_batch_arithmetic(config, learner))
        report.message(learner.policy.model.kernels.said)
        collector.push(learner.export(), version=self._start)
        try:
            if not self._start:
                self._carried = {f"{name}_base": value for name, value in self._evaluate(collector).items()}
            for step in range(self._start, config.steps):
                if step and config.evaluation.every and step % config.evaluation.every == 0:
                    self._evaluate(collector)
                self._step(collector, step)
                if self._checkpoints.due(self._done, config.steps):
                    self._save()
            final = {f"{name}_final": value for name, value in self._evaluate(collector).items()}
        except (InterruptionError, EngineError):
            if not self._begun:
                self._save_the_rest()
            raise
        with report.phase("export"):
            learner.save_models()
        return report.summary(_summary(config, learner, self._carried | final))

    def _step(self, collector: Collector, step: int) -> None:
        learner, critic, report = self._learner, self._learner.critic, self._report
        with report.step(step):
            rollout = learner.rollouts.sample(collector, step)  # {o_i} ~ pi_old(.|q), r_i
            self._begun = True
            report.add(rollout_figures(rollout.sampled) | rollout.figures)
            report.add(throughput(rollout.sampled, rollout.seconds))
            collector.rest()
            with report.phase("logprobs"):
                if self._compared and learner.on_policy:
                    batch, figures = learner.unscored(rollout.groups, step)  # pi_old comes with the update
                else:
                    batch, figures = learner.score(rollout.groups, step)  # pi_old, pi_ref, V
                batch, estimated = learner.estimate(rollout.groups, batch, step)  # A_i = (r_i - mean) / std
            self._compare(figures)
            warn_of_nothing_to_learn(report, rollout.sampled, estimated["zero_advantages"], step)
            with report.phase("update"):
                if critic:
                    report.add(critic.step(batch))  # V -> R
                if not (critic and critic.warming(step)):
                    figures |= self._update(step, batch, rollout.groups)  # ascend J
            lost = self._push(collector, step + 1)  # pi_old <- pi_theta
            if learner.reference and learner.reference.refresh(step + 1):
                report.message(f"reference := policy after step {step + 1}")
            report.add(figures | estimated | memory.peak() | collector.fleet_figures())
            counters = {name: self._earlier.get(name, 0.0) + count for name, count in collector.counters.items()}
            report.set(counters)
            self._carried = _with_mean_difference(self._carried, figures, step) | learner.rollouts.state() | counters
        self._done, self._begun = step + 1, False
        report.samples(step, [rollout.groups[shown(rollout.groups, step)]], "train", learner.tokenizer.pieces)
        if lost:
            raise lost

    def _push(self, collector: Collector, version: int) -> EngineError | None:
        """Returns why no engine has the weights: the step that made them is done all the same."""
        try:
            collector.push(self._learner.export(), version)
        except EngineError as error:
            return error
        return None

    def _compare(self, figures: Figures) -> None:
        """Before the first update, and until there were samples of the learner's own weights."""
        if not self._compared and "logprob_difference_mean" in figures:
            self._report.message(refuse_above(self._config.logprob_bound, figures))
            self._compared = True

    def _update(self, step: int, batch: Sequence[Minibatch], groups: Sequence[Group]) -> Figures:
        """The policy's updates of a step. Returns what `score` has not said before."""
        policy, tick = self._learner.policy, time.perf_counter()
        for part in batch:
            minibatch, figures, found = self._learner.update(part, groups, step, self._judge)
            self._report.add(figures)
            self._guard.follow_up(step, minibatch, lambda part: [-said for said in policy.outputs(part)])
        lengths = [trajectory.length for trajectory in trajectories(groups)]
        speed = self._throughput.figures(lengths, time.perf_counter() - tick)
        del speed["tokens_per_second"]  # that name is the rollout's
        self._report.add(speed)
        return found

    def _judge(self, loss: float | None, grad_norm: float) -> bool:
        """By the gradient alone: the loss is near zero whatever is learned."""
        return self._guard.judge(None if loss is None or math.isfinite(loss) else loss, grad_norm)

    def _evaluate(self, collector: Collector) -> Figures:
        with self._report.phase("evaluation"):
            return self._learner.evaluate(collector, self._report, self._done)

    def _save(self) -> None:
        """A checkpoint of the steps done. Raises Stopped if a signal has asked the run to end."""
        learner, done = self._learner, self._done
        self._saved = done
        with self._report.phase("checkpoint"):
            if learner.critic:
                learner.critic.save(done)
            carried = self._carried | self._guard.state() | learner.rollouts.kept()
            self._checkpoints.save(done, learner.policy.trainable, learner.weight_sets(), carried)

    def _save_the_rest(self) -> None:
        """A signal in a rollout, or engines that are gone: save the steps before it that no checkpoint has."""
        self._checkpoints.due(self._done, self._config.steps)  # the request is met: saving may take its time
        if self._done > self._saved:
            self._save()
        self._checkpoints.finish()


def _resume(learner: Learner, checkpoints: Checkpoints, start: int) -> Figures:
    carried = checkpoints.load(start, learner.policy.trainable, learner.weight_sets())
    if learner.critic:
        learner.critic.load(start)
    learner.rollouts.restore({"questions_drawn": start * learner.config.questions} | carried)
    return {name: value for name, value in carried.items() if name not in (IN_FLIGHT, PASS_RATES)}


def warn_of_nothing_to_learn(report: Report, groups: list[Group], idle: float, step: int) -> None:
    """Say at once what makes a run useless. `idle`: share of samples without any advantage."""
    if step >= _FIRST_STEPS:
        return
    samples = sum(len(group.samples) for group in groups)
    for name, value in constant_rewards(groups).items():
        report.message(
            f"warning: reward {name!r} is {value:g} for all {samples} samples of step {step}, so nothing can be "
            "learned from it: look at samples.jsonl, and at what the reward expects"
        )
    if idle == 1:
        report.message(
            f"warning: all advantages of step {step} are zero, so this step teaches nothing: the questions are too "
            "hard or too easy, or the rewards are constant"
        )


def _with_mean_difference(carried: Figures, figures: Figures, step: int) -> Figures:
    """The mean over all steps so far of the log-probability difference, kept with what a resumed run needs."""
    name = "logprob_difference_mean"
    before = carried.get(name, 0.0)
    return carried | {name: before + (figures.get(name, before) - before) / (step + 1)}


def _batch_arithmetic(config: RLConfig, learner: Learner) -> str:
    samples, model = config.questions * config.group_size, learner.policy.model
    memory = [in_words("policy", learner.policy.trainable)]
    if learner.critic:
        memory.append(in_words("critic", learner.critic.scorer.trainable))
    return (
        f"{lora.size(parameter_counts(model.chunks), model.config.params_dtype)}; "
        f"a step is {counted(config.questions, 'question')} x {counted(config.group_size, 'sample')} = {samples} "
        f"samples = {counted(config.minibatches, 'update')} of {samples // config.minibatches}; "
        f"weights, gradients and optimizer: {', '.join(memory)}"
    )


def _summary(config: RLConfig, learner: Learner, figures: Figures) -> dict[str, Any]:
    short = {name.replace("heldout_format", "format_rate"): value for name, value in figures.items()}
    critic = {"critic_bytes": state_bytes(learner.critic.scorer.trainable)} if learner.critic else {}
    return {
        "model": str(config.output / "hf"),
        "steps": config.steps,
        "updates": (config.steps - (config.critic.warmup if config.critic else 0)) * config.minibatches,
        "samples": config.steps * config.questions * config.group_size,
        "policy_bytes": state_bytes(learner.policy.trainable),
        **critic,
        **short,
    }
