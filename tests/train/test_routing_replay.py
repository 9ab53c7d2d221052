"""Recorded experts on their way to the routers: packed beside their tokens, for the policy alone, refused if unfit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_r1.config.asynchrony import AheadSection
from megatron_r1.config.load import validate
from megatron_r1.config.sections import PolicySection
from megatron_r1.errors import ConfigError, EngineError
from megatron_r1.loss.grpo import Grpo
from megatron_r1.model.build import build_model
from megatron_r1.train import kept_groups
from megatron_r1.train.batch import Share, Trajectory, routed_freely, split, with_inputs
from megatron_r1.train.layout import Alignment
from megatron_r1.train.mismatch import logprob_difference
from megatron_r1.train.policy import Policy
from megatron_r1.train.reference import Reference
from megatron_r1.train.routing_replay import refuse_unfit, refuse_unrecorded, without_replay
from megatron_r1.types import Group, Question, Sample
from tests.model.dense_models import write_dense
from tests.train.conftest import one_minibatch, rollout

LAYERS, EXPERTS, CHOSEN = 3, 8, 4
"""Of the tiny model."""


def recorded(samples: list[Trajectory], seed: int = 0) -> list[Trajectory]:
    """The same with distinct experts for each token, at random."""
    draw = np.random.default_rng(seed)

    def experts(length: int) -> np.ndarray:
        return draw.random((length, LAYERS, EXPERTS)).argsort(-1)[..., :CHOSEN].astype(np.uint8)

    return [replace(sample, routed_experts=experts(sample.length)) for sample in samples]


def loss() -> Grpo:
    return Grpo(Grpo.Config())


def test_experts_lie_beside_their_tokens() -> None:
    samples = recorded(rollout(7))
    share = Share(0, 1, 60, torch.device("cpu"), Alignment(sequence=4, row=8), multiple=9)
    [minibatch] = split(samples, 1, 0, loss(), share)
    assert any(not micro.samples for micro in minibatch), "none of padding alone"
    for micro in minibatch:
        if not micro.samples:
            assert micro.routed_experts is None
            continue
        assert micro.routed_experts is not None
        assert micro.ends is not None
        assert micro.routed_experts.shape == (*micro.tokens.shape, LAYERS, CHOSEN)
        for number, start in zip(micro.samples, micro.ends.tolist(), strict=False):
            sample = samples[number]
            there = slice(start, start + sample.length)
            assert micro.tokens[0, there].tolist() == sample.tokens[:-1]
            assert np.array_equal(micro.routed_experts[0, there].numpy(), sample.routed_experts)
    mixed = [*samples[:6], replace(samples[6], routed_experts=None)]
    [[micro]] = split(mixed, 1, 0, loss(), Share(0, 1, 10_000, torch.device("cpu")))
    assert micro.routed_experts is None


def test_packing_changes_nothing(make_policy: Callable[..., Policy]) -> None:
    """What one sequence is told does not reach another."""
    policy, samples = make_policy(), recorded(rollout(9))
    [[together]] = split(samples, 1, 0, loss(), Share(0, 1, 10_000, torch.device("cpu")))
    [whole] = policy.logprobs([together])
    parts = whole.split(torch.bincount(together.inputs.segments).tolist())
    for number, part in zip(together.samples, parts, strict=True):
        [found] = policy.logprobs(one_minibatch([samples[number]], loss()))
        torch.testing.assert_close(found, part, atol=1e-5, rtol=0)
    freely = torch.cat(policy.logprobs(routed_freely([together])))
    assert (freely - whole).abs().mean() > 0.01


def test_an_update_uses_them(make_policy: Callable[..., Policy]) -> None:
    """The ratio to the log-probabilities before is 1, and experts that no token is sent to get no gradient."""
    policy, samples = make_policy(), rollout(6)
    told = [replace(s, routed_experts=np.tile(np.uint8([5, 2, 7, 0]), (s.length, LAYERS, 1))) for s in samples]
    minibatch = one_minibatch(told, loss())
    minibatch = with_inputs(minibatch, old_logprobs=policy.logprobs(minibatch))
    before = {name: value.clone() for name, value in policy.model.module.named_parameters()}
    figures = policy.step(minibatch, Grpo(Grpo.Config(kl_coef=0.0)))
    assert figures["ratio"] == pytest.approx(1, abs=1e-5)
    moved = {
        int(name.split("local_experts.")[1].split(".")[0])
        for name, value in policy.model.module.named_parameters()
        if "local_experts." in name and not torch.equal(value, before[name])
    }
    assert moved == {0, 2, 5, 7}
    assert figures["idle_experts"] == 0.5


def test_the_reference_chooses_for_itself(make_policy: Callable[..., Policy]) -> None:
    policy, minibatch = make_policy(), one_minibatch(recorded(rollout(4)), loss())
    reference = Reference(policy, 10)
    [[found]] = reference.logprobs([minibatch])
    [expected] = policy.logprobs(routed_freely(minibatch))
    assert torch.equal(found, expected)
    assert not torch.equal(found, policy.logprobs(minibatch)[0])


def test_figures_without_replay(make_policy: Callable[..., Policy]) -> None:
    policy, samples = make_policy(), recorded(rollout(8))
    told = one_minibatch(samples, loss())
    [own] = policy.logprobs(routed_freely(told))
    told[0].engine_logprobs = own + 0.25
    figures = without_replay(policy, told, logprob_difference)
    assert figures["own_routing_difference_mean"] == pytest.approx(0.25, abs=1e-6)
    assert 0.9 < figures["rerouted_choices"] <= figures["rerouted_tokens"] <= 1
    assert set(figures) == {
        *("own_routing_difference_mean", "own_routing_difference_max", "rerouted_choices", "rerouted_tokens")
    }


def group(**changes: object) -> Group:
    experts = np.zeros((4, LAYERS, CHOSEN), dtype=np.uint8)
    sample = Sample([7, 8, 2], [-1.0] * 3, "", True, 0, routed_experts=experts)
    return Group(Question("q-1", "task", "?", "!"), [5, 6], [replace(sample, **changes)])  # type: ignore[arg-type]


def test_what_was_recorded_of_another_model_is_refused(make_policy: Callable[..., Policy]) -> None:
    model = make_policy().model
    refuse_unrecorded([group()], model)
    with pytest.raises(EngineError, match=r"\[4, 3, 4\] of a response to question q-1, but it came with none"):
        refuse_unrecorded([group(), group(routed_experts=None)], model)
    with pytest.raises(EngineError, match=r"came with \[4, 3, 2\]"):
        refuse_unrecorded([group(routed_experts=np.zeros((4, LAYERS, 2), dtype=np.uint8))], model)
    with pytest.raises(EngineError, match="recorded expert 8 of 8"):
        refuse_unrecorded([group(routed_experts=np.full((4, LAYERS, CHOSEN), 8, dtype=np.uint8))], model)


def test_models_that_cannot_be_told_are_refused(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    model = make_policy().model
    refuse_unfit(model)
    write_dense(tmp_path / "dense", "llama", 0)
    dense = build_model(PolicySection(path=tmp_path / "dense", dtype="float32"), 64)
    with pytest.raises(ConfigError, match=r"routing_replay: .*dense has no experts"):
        refuse_unfit(dense)
    kernels = replace(model.kernels, options=model.kernels.options | {"router_fusion": True})
    fused = replace(model, setting=replace(model.setting, kernels=kernels))
    with pytest.raises(ConfigError, match="router_fusion = false"):
        refuse_unfit(fused)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--pipeline-parallel-size=2"], "pipeline stages"), (["--no-enable-prefix-caching"], "beside the prefix cache")],
)
def test_engines_that_cannot_record_are_refused(arguments: list[str], said: str) -> None:
    tree = {"max_model_len": 64, "max_tokens": 32, "arguments": arguments}
    validate(AheadSection, tree, where="test")
    with pytest.raises(ConfigError, match=said):
        validate(AheadSection, tree | {"routing_replay": True}, where="test")


def test_a_checkpoint_keeps_them(tmp_path: Path) -> None:
    kept = group()
    torch.save(kept_groups.pack(kept), tmp_path / "kept.pt")
    again = kept_groups.unpack(torch.load(tmp_path / "kept.pt"), kept.question, kept.prompt_tokens)
    assert again == kept
    ours, theirs = again.samples[0].routed_experts, kept.samples[0].routed_experts
    assert ours is not None
    assert theirs is not None
    assert ours.dtype == np.uint8
    assert np.array_equal(ours, theirs)
    without = group(routed_experts=None)
    assert kept_groups.unpack(kept_groups.pack(without), kept.question, [5, 6]).samples[0].routed_experts is None
