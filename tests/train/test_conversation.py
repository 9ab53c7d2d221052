"""What tools have said is read and not learned from: in the loss, in advantages, and in all that counts tokens."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_r1.advantage.base import Advantage
from megatron_r1.config import component
from megatron_r1.config.asynchrony import CorrectionSection
from megatron_r1.loss.base import Loss
from megatron_r1.report.rollout_figures import rollout_figures, throughput
from megatron_r1.report.samples import sample_rows
from megatron_r1.train import kept_groups
from megatron_r1.train.batch import Minibatch, Share, attach, split, trajectories, with_inputs
from megatron_r1.train.collector import among_sampled
from megatron_r1.train.correction import corrected
from megatron_r1.train.gather import gather
from megatron_r1.train.mismatch import logprob_difference
from megatron_r1.train.policy import Policy
from megatron_r1.types import Group, Question, Sample

MakePolicy = Callable[..., Policy]
ASKED, SAID, REPLIED = range(3, 100), range(100, 380), range(380, 400)
"""Token ids of prompts, of the model and of tools."""
LOSSES: list[dict[str, Any]] = [
    *({"type": "grpo", "clip_eps": 0.2, "kl_coef": 0.1, "aggregate": aggregate} for aggregate in ("sequence", "token")),
    {"type": "grpo", "ratio": "sequence", "clip_eps": 0.2},
    {"type": "gspo"},
    {"type": "cispo"},
    {"type": "ppo"},
]


def conversations(count: int = 6, seed: int = 0) -> list[Group]:
    """Groups of two; every second sample is a conversation of two or three turns."""
    rng = random.Random(seed)

    def some(kind: range, least: int, most: int) -> list[int]:
        return [rng.choice(kind) for _ in range(rng.randint(least, most))]

    groups = []
    for number in range(count):
        samples = []
        for conversation in (True, False):
            turns = [(some(SAID, 2, 9), True)]
            for _ in range(rng.randint(1, 2) if conversation else 0):
                turns += [(some(REPLIED, 1, 9), False), (some(SAID, 1, 9), True)]
            tokens = [token for turn, _ in turns for token in turn]
            mask = [mine for turn, mine in turns for _ in turn] if conversation else []
            sample = Sample(tokens, [], "text", True, 0, {"sum": 1.0}, rng.gauss(0, 1), mask=mask)
            sample.logprobs = [-rng.random() for _ in range(sample.length)]
            samples.append(sample)
        groups.append(Group(Question(f"q{number}", "sums", "p", "a"), some(ASKED, 3, 8), samples))
    return groups


def batch_of(groups: list[Group], loss: Loss, capacity: int = 60) -> Minibatch:
    share = Share(rank=0, ranks=1, capacity=capacity, device=torch.device("cpu"))
    advantage: Advantage = component.build("advantage", {"type": "group_relative"})
    advantage(groups)
    samples = [sample for group in groups for sample in group.samples]
    return attach(
        next(split(trajectories(groups), 1, 0, loss, share)), advantages=[sample.advantages for sample in samples]
    )


def update(policy: Policy, minibatch: Minibatch, loss: Loss) -> tuple[float, list[torch.Tensor]]:
    """The loss, and how far an update moves each parameter."""
    module = policy.model.module
    old = [said - 0.05 for said in policy.logprobs(minibatch)]
    ready = with_inputs(minibatch, old_logprobs=old, ref_logprobs=[said - 0.1 for said in old])
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    value = policy.step(ready, loss)["loss"]
    return value, [p.detach() - before[name] for name, p in module.named_parameters()]


def relabelled(minibatch: Minibatch, kind: range) -> Minibatch:
    """Where a token of this kind is to be predicted, another one is."""

    def other(labels: torch.Tensor) -> torch.Tensor:
        ours = (labels >= kind.start) & (labels < kind.stop)
        assert ours.any()
        return torch.where(ours, kind.start + (labels - kind.start + 1) % len(kind), labels)

    return [replace(micro, labels=other(micro.labels)) for micro in minibatch]


@pytest.mark.parametrize("section", LOSSES, ids=lambda part: "-".join(map(str, part.values())))
def test_what_a_tool_says_has_no_loss(make_policy: MakePolicy, section: dict[str, Any]) -> None:
    loss: Loss = component.build("loss", section)
    minibatch = batch_of(conversations(), loss)
    value, moved = update(make_policy(), minibatch, loss)
    other, same = update(make_policy(), relabelled(minibatch, REPLIED), loss)
    assert value == other
    assert all(torch.equal(one, two) for one, two in zip(moved, same, strict=True))
    _, different = update(make_policy(), relabelled(minibatch, SAID), loss)
    assert not all(torch.equal(one, two) for one, two in zip(moved, different, strict=True))


def test_the_loss_is_the_mean_over_sampled_tokens_of_whole_rows(make_policy: MakePolicy) -> None:
    """Row by row, token by token, in a Python loop: replies are context, and nothing else."""
    policy, groups = make_policy(), conversations()
    loss: Loss = component.build("loss", {"type": "grpo", "clip_eps": 0.2, "kl_coef": 0.1})
    minibatch = batch_of(groups, loss)
    old = policy.logprobs(minibatch)
    ready = with_inputs(minibatch, old_logprobs=old, ref_logprobs=[said - 0.1 for said in old])
    figures = policy.evaluate(ready, loss)
    samples = [(group.prompt_tokens, sample) for group in groups for sample in group.samples]
    expected, module = 0.0, policy.model.module.eval()
    found = gather([minibatch], [old], range(len(samples)))
    for number, (prompt, sample) in enumerate(samples):
        row, total, count = torch.tensor([prompt + sample.tokens]), 0.0, 0
        with torch.no_grad():
            said = -module(row[:, :-1], torch.arange(row.size(1) - 1)[None], None, labels=row[:, 1:])[0]
        mask = sample.mask or [True] * len(sample.tokens)
        alone = [float(said[len(prompt) - 1 + place]) for place, mine in enumerate(mask) if mine]
        assert found[number] == pytest.approx(alone, abs=2e-6)
        for advantage in sample.advantages:
            kl = 2.718281828459045**-0.1 + 0.1 - 1
            total, count = total + advantage - 0.1 * kl, count + 1
        assert count == len(alone) == sample.length
        expected -= total / count / len(samples)
    assert figures["loss"] == pytest.approx(expected, abs=1e-5)


def test_trainer_and_engine_are_compared_over_sampled_tokens(make_policy: MakePolicy) -> None:
    policy, groups = make_policy(), conversations()
    loss: Loss = component.build("loss", {"type": "grpo"})
    minibatch = batch_of(groups, loss)
    old = policy.logprobs(minibatch)
    samples = [sample for group in groups for sample in group.samples]
    for number, said in gather([minibatch], [old], range(len(samples))).items():
        samples[number].logprobs = [value - 0.25 for value in said]
    batch = [with_inputs(batch_of(groups, loss), old_logprobs=old)]
    assert logprob_difference(batch)["logprob_difference_mean"] == pytest.approx(0.25, abs=1e-5)
    section = CorrectionSection(kind="token", cap=1.2)
    weighted, figures = corrected(batch, section)
    assert figures["importance_changed"] == 1.0
    assert figures["importance_ratio"] == pytest.approx(2.718281828459045**0.25, abs=1e-4)
    assert sum(len(micro.inputs.importance) for micro in weighted[0]) == sum(sample.length for sample in samples)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["group_relative", "leave_one_out", "process", "gae"])
def test_an_estimator_sees_the_sampled_tokens_alone(kind: str) -> None:
    """The same advantages as for responses without what the tools said."""
    estimate: Advantage = component.build("advantage", {"type": kind})
    spoken, plain = conversations(), conversations()
    for group in plain:
        for sample in group.samples:
            if sample.mask:
                sample.tokens = [token for token, mine in zip(sample.tokens, sample.mask, strict=True) if mine]
                sample.mask = []
    for group in (*spoken, *plain):
        for sample in group.samples:
            sample.values = [0.1 * number for number in range(sample.length)]
            sample.step_rewards = [(sample.length // 2, 1.0), (sample.length - 1, sample.reward)]
    estimate(spoken)
    estimate(plain)
    for one, other in zip(spoken, plain, strict=True):
        for sample, same in zip(one.samples, other.samples, strict=True):
            assert sample.advantages == same.advantages
            assert len(sample.advantages) == sample.length


def test_steps_that_end_in_a_reply_are_nobodys() -> None:
    mask = [True, True, False, False, True]
    assert among_sampled([(1, 0.5), (3, 0.7), (4, 1.0)], mask) == [(1, 0.5), (2, 1.0)]


def test_figures_and_rows_count_what_was_sampled() -> None:
    groups = conversations(count=1)
    talk, plain = groups[0].samples
    figures = rollout_figures(groups)
    replies = "".join("x" if mine else "-" for mine in talk.mask).replace("x", " ").split()
    assert figures["response_length"] == (talk.length + plain.length) / 2
    assert figures["tool_calls"] == len(replies) / 2
    assert figures["tool_tokens"] == sum(map(len, replies)) / 2
    assert throughput(groups, 2.0) == {"tokens_per_second": (talk.length + plain.length) / 2}
    [row] = sample_rows(0, groups, "train", lambda tokens: [str(token) for token in tokens])
    shown = row["responses"][0]
    assert shown["tokens"] == talk.length
    assert len(shown["pieces"]) == len(shown["engine_logprobs"]) == len(talk.tokens)
    assert [value is not None for value in shown["engine_logprobs"]] == talk.mask
    assert [v for v in shown["engine_logprobs"] if v is not None] == pytest.approx(talk.logprobs, abs=1e-6)
    assert "tool_calls" not in rollout_figures([replace(groups[0], samples=[plain])])


def test_a_checkpoint_keeps_conversations() -> None:
    [group] = conversations(count=1)
    group.samples[0].answer_from = 3
    group.samples[0].weight_spans = [(0, 2), (1, group.samples[0].length)]
    again = kept_groups.unpack(kept_groups.pack(group), group.question, group.prompt_tokens)
    for sample, kept in zip(group.samples, again.samples, strict=True):
        assert replace(kept, logprobs=sample.logprobs) == sample
        assert kept.logprobs == pytest.approx(sample.logprobs, abs=1e-6)
