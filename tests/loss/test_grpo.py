"""GRPO against numbers worked by hand and against a loop over samples and tokens written from the paper."""

import math

import pytest
import torch

from megatron_r1.config.load import validate
from megatron_r1.errors import ConfigError
from megatron_r1.loss.base import LossInputs
from megatron_r1.loss.grpo import Grpo


def build(**config: object) -> Grpo:
    return Grpo(validate(Grpo.Config, config, where="test"))


def inputs(loss: Grpo, samples: list[dict[str, list[float]]]) -> tuple[torch.Tensor, LossInputs]:
    lengths = [len(sample["new"]) for sample in samples]
    weights = loss.token_weights(lengths)
    flat = {key: torch.tensor([x for sample in samples for x in sample[key]]) for key in ("new", "old", "ref")}
    counts = torch.tensor(lengths)
    return flat["new"].requires_grad_(), LossInputs(
        weights=torch.tensor(weights).repeat_interleave(counts),
        segments=torch.arange(len(samples)).repeat_interleave(counts),
        advantages=torch.tensor([sample["advantage"] for sample in samples]).repeat_interleave(counts),
        old_logprobs=flat["old"],
        ref_logprobs=flat["ref"],
    )


def by_the_paper(samples: list[dict], eps: float, beta: float) -> float:  # type: ignore[type-arg]
    """-J of DeepSeekMath eq. 3, one loop a sum sign, in plain Python."""
    objective = 0.0
    for sample in samples:
        total = 0.0
        for new, old, ref in zip(sample["new"], sample["old"], sample["ref"], strict=True):
            ratio, advantage = math.exp(new - old), sample["advantage"]
            clipped = min(max(ratio, 1 - eps), 1 + eps)
            kl = math.exp(ref) / math.exp(new) - math.log(math.exp(ref) / math.exp(new)) - 1
            total += min(ratio * advantage, clipped * advantage) - beta * kl
        objective += total / len(sample["new"])
    return -objective / len(samples)


def random_samples(seed: int) -> list[dict]:  # type: ignore[type-arg]
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> list[float]:
        return (-2 * torch.rand(n, generator=generator)).tolist()

    lengths = [1, 3, 7, 2]
    return [
        {"new": draw(n), "old": draw(n), "ref": draw(n), "advantage": a}
        for n, a in zip(lengths, [1.5, -0.5, 0.7, -1.7], strict=True)
    ]


def test_worked_by_hand() -> None:
    """One sample, one token: ratio 1.5 / 1 clipped at 1.2, advantage 2, ref = half the policy's probability."""
    loss = build(clip_eps=0.2, kl_coef=0.1)
    sample = {"new": [math.log(0.6)], "old": [math.log(0.4)], "ref": [math.log(0.3)], "advantage": 2.0}
    new, data = inputs(loss, [sample])
    value, metrics = loss(new, data)
    kl = 0.5 - math.log(0.5) - 1  # 0.193147
    assert value.item() == pytest.approx(-(1.2 * 2.0) + 0.1 * kl, abs=1e-6)  # -2.380685
    assert metrics["kl"].item() == pytest.approx(0.193147, abs=1e-6)
    assert metrics["clip_fraction"].item() == 1.0
    value.backward()
    # Clipped: only the KL term pulls. d/dnew (e^d - d - 1) = 1 - e^d = 0.5.
    assert new.grad is not None
    assert new.grad.item() == pytest.approx(0.1 * 0.5, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("eps", "beta"), [(0.2, 0.04), (10.0, 0.001)])
def test_equals_the_paper_written_as_loops(seed: int, eps: float, beta: float) -> None:
    loss = build(clip_eps=eps, kl_coef=beta)
    samples = random_samples(seed)
    value, _ = loss(*inputs(loss, samples))
    assert value.item() == pytest.approx(by_the_paper(samples, eps, beta), rel=1e-5)


def test_gradient_at_the_start_is_the_policy_gradient() -> None:
    """At ratio 1 and without KL the gradient is -A / (G |o|) for every token."""
    loss = build(kl_coef=0.0)
    samples = random_samples(0)
    for sample in samples:
        sample["old"] = sample["new"]
    new, data = inputs(loss, samples)
    loss(new, data)[0].backward()
    expected = [-s["advantage"] / (len(samples) * len(s["new"])) for s in samples for _ in s["new"]]
    assert new.grad is not None
    torch.testing.assert_close(new.grad, torch.tensor(expected))


def test_r1_clip_bounds_only_above() -> None:
    """eps = 10: a ratio of e^-9 is not clipped, one of e^3 = 20 is, and only for a positive advantage."""
    loss = build(clip_eps=10.0, kl_coef=0.0)

    def cut(log_ratio: float, advantage: float) -> float:
        sample = {"new": [float(log_ratio)], "old": [0.0], "ref": [0.0], "advantage": advantage}
        return float(loss(*inputs(loss, [sample]))[1]["clip_fraction"])

    assert [cut(-9, 1.0), cut(-9, -1.0), cut(3, 1.0), cut(3, -1.0)] == [0, 0, 1, 0]


def test_clip_higher() -> None:
    loss = build(clip_eps=0.2, clip_eps_high=0.5, kl_coef=0.0)
    sample = {"new": [math.log(1.4)], "old": [0.0], "ref": [0.0], "advantage": 1.0}
    assert loss(*inputs(loss, [sample]))[0].item() == pytest.approx(-1.4)


def test_sequence_ratio_is_the_product_of_token_ratios() -> None:
    loss = build(clip_eps=0.2, kl_coef=0.0, ratio="sequence")
    samples = [
        {"new": [0.1, -0.3], "old": [0.0, -0.1], "ref": [0.0, 0.0], "advantage": 1.0},
        {"new": [0.5], "old": [0.0], "ref": [0.0], "advantage": -1.0},
    ]
    value, _ = loss(*inputs(loss, samples))
    first, second = math.exp(0.1 - 0.2), math.exp(0.5)
    assert value.item() == pytest.approx(-(first * 1.0 + second * -1.0) / 2, rel=1e-6)


def test_an_idle_microbatch_adds_nothing() -> None:
    empty = torch.zeros(0)
    data = LossInputs(empty, torch.zeros(0, dtype=torch.long), empty, empty, empty)
    for ratio in ("token", "sequence"):
        assert build(ratio=ratio)(empty.clone().requires_grad_(), data)[0].item() == 0.0


def test_aggregates() -> None:
    lengths = [1, 3]
    assert build().token_weights(lengths) == [1 / 2, 1 / 6]
    assert build(aggregate="token").token_weights(lengths) == [1 / 4, 1 / 4]
    assert build(aggregate="constant", max_tokens=10).token_weights(lengths) == [1 / 20, 1 / 20]
    with pytest.raises(ConfigError, match="max_tokens goes with"):
        build(aggregate="constant")


def test_kl_is_never_negative_and_zero_at_the_reference() -> None:
    loss = build()
    samples = random_samples(3)
    assert float(loss(*inputs(loss, samples))[1]["kl"]) > 0
    for sample in samples:
        sample["ref"] = sample["new"]
    assert float(loss(*inputs(loss, samples))[1]["kl"]) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_dapo_and_dr_grpo_are_options(seed: int) -> None:
    """DAPO eq. 8: clip-higher, no KL, all tokens alike. Dr. GRPO eq. 2: a constant in the place of |o_i|."""
    samples = random_samples(seed)
    gains = [
        [
            min(math.exp(n - o) * sample["advantage"], min(max(math.exp(n - o), 0.8), 1.28) * sample["advantage"])
            for n, o in zip(sample["new"], sample["old"], strict=True)
        ]
        for sample in samples
    ]
    total, tokens = sum(map(sum, gains)), sum(map(len, gains))
    keys = {"clip_eps": 0.2, "clip_eps_high": 0.28, "kl_coef": 0.0}
    dapo, dr = build(**keys, aggregate="token"), build(**keys, aggregate="constant", max_tokens=64)
    assert not dapo.needs_reference
    assert dapo(*inputs(dapo, samples))[0].item() == pytest.approx(-total / tokens, rel=1e-5)
    assert dr(*inputs(dr, samples))[0].item() == pytest.approx(-total / (len(samples) * 64), rel=1e-5)


def test_a_ratio_of_whole_outputs_that_overflows_leaves_the_gradient_finite() -> None:
    """120 nats over 40 tokens: exp(120) is no float32. The first output is clipped, the second no longer pushed."""
    loss = build(ratio="sequence", kl_coef=0.0)
    tokens = {"new": [-1.0] * 40, "old": [-4.0] * 40, "ref": [-1.0] * 40}
    kept = {"new": [-1.0], "old": [-1.0], "ref": [-1.0], "advantage": -1.0}
    samples: list[dict] = [tokens | {"advantage": 1.0}, tokens | {"advantage": -1.0}, kept]  # type: ignore[type-arg]
    new, data = inputs(loss, samples)
    value, metrics = loss(new, data)
    value.backward()
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx([0.0] * 80 + [1 / 3])
    assert all(torch.isfinite(figure) for figure in metrics.values())
