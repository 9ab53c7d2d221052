"""`megatron-r1 rl`: reinforcement learning with verifiable rewards.

::

    questions -> rollouts: engine.sample, judge -> random minibatches -> old and reference log-probabilities, values
                     ^                                                            |
                sync.push  <-  policy.step(loss), critic.step  <-  advantages of all tokens
"""

import time
from typing import Any

from megatron_r1.checkpoint.store import Checkpoints
from megatron_r1.config.load import dump
from megatron_r1.config.runs import RLConfig
from megatron_r1.model import lora
from megatron_r1.model.parallel import initialize, is_first_rank
from megatron_r1.report.rollout_figures import constant_rewards, rollout_figures, throughput
from megatron_r1.report.run import Report
from megatron_r1.train.collector import Collector
from megatron_r1.train.learner import Learner
from megatron_r1.train.memory import in_words, state_bytes
from megatron_r1.train.mismatch import refuse_above
from megatron_r1.train.policy import Figures
from megatron_r1.types import Group

_FIRST_STEPS = 3
"""Steps in which a reward that is the same for all samples is a mistake, and not a task that is learned."""


def run(config: RLConfig) -> dict[str, Any]:
    """Train, or go on where the output folder's newest checkpoint stands; ends with an HF export."""
    initialize(config.parallel, config.seed)
    learner = Learner.build(config)
    policy, critic = learner.policy, learner.critic
    checkpoints = Checkpoints(config.output / "checkpoints", config.checkpoint, {"seed": config.seed})
    start = checkpoints.latest() or 0
    carried = _resume(learner, checkpoints, start) if start else {}
    title, first = config.report.title or "Reinforcement learning", is_first_rank()
    report = Report(config.output, config.report, title, config.steps, dump(config), start, enabled=first)
    with report, Collector(config, learner.tokenizer, report) as collector:
        report.message(_batch_arithmetic(config, learner))
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
                rollout = learner.rollouts.sample(collector, step)  # {o_i} ~ pi_old(.|q), r_i
                report.add(rollout_figures(rollout.sampled) | rollout.figures)
                report.add(throughput(rollout.sampled, time.perf_counter() - tick))
                with report.phase("logprobs"):
                    batch, figures = learner.score(rollout.groups, step)  # pi_old, pi_ref, V
                    batch, estimated = learner.estimate(rollout.groups, batch)  # A_i = (r_i - mean) / std
                if step == start:
                    report.message(refuse_above(config.logprob_bound, figures))
                warn_of_nothing_to_learn(report, rollout.sampled, estimated["zero_advantages"], step)
                carried = _with_mean_difference(carried, figures, step) | learner.rollouts.state()
                with report.phase("update"):
                    if critic:
                        report.add(critic.step(batch))  # V -> R
                    for minibatch in batch if not (critic and critic.warming(step)) else []:
                        report.add(policy.step(minibatch, learner.loss))  # ascend J
                collector.push(learner.export(), version=done)  # pi_old <- pi_theta
                if learner.reference and learner.reference.refresh(done):
                    report.message(f"reference := policy after step {done}")
                report.add(figures | estimated)
                counters = {name: earlier.get(name, 0.0) + count for name, count in collector.counters.items()}
                report.set(counters)
                carried |= counters
            report.samples(step, rollout.groups[:1], "train", learner.tokenizer.pieces)
            if checkpoints.due(done, config.steps):
                with report.phase("checkpoint"):
                    _save(learner, checkpoints, done, carried)
        final = {f"{name}_final": value for name, value in learner.evaluate(collector, report, config.steps).items()}
        learner.save_models()
        return report.summary(_summary(config, learner, carried | final))


def _resume(learner: Learner, checkpoints: Checkpoints, start: int) -> Figures:
    carried = checkpoints.load(start, learner.policy.trainable, learner.weight_sets())
    if learner.critic:
        learner.critic.load(start)
    learner.rollouts.restore({"questions_drawn": start * learner.config.questions} | carried)
    return carried


def _save(learner: Learner, checkpoints: Checkpoints, done: int, carried: Figures) -> None:
    if learner.critic:
        learner.critic.save(done)
    checkpoints.save(done, learner.policy.trainable, learner.weight_sets(), carried)


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
    return carried | {name: before + (figures[name] - before) / (step + 1)}


def _batch_arithmetic(config: RLConfig, learner: Learner) -> str:
    samples = config.questions * config.group_size
    memory = [in_words("policy", learner.policy.trainable)]
    if learner.critic:
        memory.append(in_words("critic", learner.critic.scorer.trainable))
    return (
        f"{lora.size(learner.policy.model.module)}; "
        f"a step is {config.questions} questions x {config.group_size} samples = {samples} "
        f"samples = {config.minibatches} updates of {samples // config.minibatches}; "
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
