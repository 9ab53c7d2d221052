"""The policy's log-probabilities and updates, against plain torch and against itself cut otherwise."""

from collections.abc import Callable

import pytest
import torch

from megatron_r1.config.sections import OptimSection
from megatron_r1.errors import NumericsError
from megatron_r1.loss.grpo import Grpo
from megatron_r1.model.build import BuiltModel
from megatron_r1.model.mapping import weights
from megatron_r1.train.batch import Minibatch, Trajectory, with_inputs
from megatron_r1.train.guard import refuse_non_finite
from megatron_r1.train.policy import Policy
from megatron_r1.train.reference import Reference
from tests.train.conftest import advantages, one_minibatch, rollout

MakePolicy = Callable[..., Policy]
LOSS = Grpo(Grpo.Config(clip_eps=0.2, kl_coef=0.1))


def alone(policy: Policy, sample: Trajectory) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies of one sample by an unpacked forward pass and torch's log_softmax."""
    tokens = torch.tensor([sample.tokens[:-1]])
    logits: list[torch.Tensor] = []
    module = policy.model.module.eval()
    handle = module.output_layer.register_forward_hook(lambda m, args, output: logits.append(output[0].clone()))
    with torch.no_grad():
        module(tokens, torch.arange(tokens.size(1))[None], None, labels=tokens)
    handle.remove()
    distribution = torch.log_softmax(logits[-1][-sample.response_length :, 0], -1)
    chosen = torch.tensor(sample.tokens[-sample.response_length :])[:, None]
    return distribution.gather(1, chosen)[:, 0], -(distribution.exp() * distribution).sum(-1)


def by_response(minibatch: Minibatch, values: list[torch.Tensor]) -> dict[tuple[int, ...], torch.Tensor]:
    found = {}
    for micro, value in zip(minibatch, values, strict=True):
        predicted = micro.labels.flatten()[micro.selected]
        for segment in micro.inputs.segments.unique():
            rows = micro.inputs.segments == segment
            found[tuple(predicted[rows].tolist())] = value[rows]
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_logprobs_and_entropies_equal_single_rows(make_policy: MakePolicy, temperature: float) -> None:
    policy, samples = make_policy(temperature), rollout(8)
    minibatch = one_minibatch(samples, LOSS, capacity=80)
    assert len(minibatch) > 1
    logprobs, entropies = policy.logprobs_and_entropies(minibatch)
    packed, spread = by_response(minibatch, logprobs), by_response(minibatch, entropies)
    for sample in samples:
        key = tuple(sample.tokens[-sample.response_length :])
        expected, entropy = alone(policy, sample)
        torch.testing.assert_close(packed[key], expected, atol=2e-6, rtol=0)
        torch.testing.assert_close(spread[key], entropy, atol=2e-5, rtol=0)


def test_logits_are_computed_where_they_count(make_policy: MakePolicy) -> None:
    policy, minibatch = make_policy(), one_minibatch(rollout(8), LOSS, capacity=80)
    shapes: list[torch.Size] = []
    policy.model.module.output_layer.register_forward_hook(lambda module, args, output: shapes.append(output[0].shape))
    policy.logprobs(minibatch)
    assert [shape[0] for shape in shapes] == [micro.selected.numel() for micro in minibatch]
    assert all(micro.selected.numel() < micro.tokens.numel() for micro in minibatch)


def test_an_update_on_policy_is_the_one_after_a_pass_for_the_old_logprobs(make_policy: MakePolicy) -> None:
    loss = Grpo(Grpo.Config(clip_eps=0.2, kl_coef=0.0))
    minibatch = one_minibatch(rollout(), loss, 60)
    one, two = make_policy(0.7), make_policy(0.7)
    figures, logprobs, entropies = one.step_on_policy(minibatch, loss, refuse_non_finite)
    old, spread = two.logprobs_and_entropies(minibatch)
    assert figures == two.step(with_inputs(minibatch, old_logprobs=old), loss)
    assert figures["ratio"] == pytest.approx(1.0, abs=1e-6)
    for ours, theirs in ((logprobs, old), (entropies, spread)):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    twins = zip(one.model.module.parameters(), two.model.module.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in twins)


def test_temperature_sharpens_the_distribution(make_policy: MakePolicy) -> None:
    minibatch = one_minibatch(rollout(4), LOSS)
    cold, warm = (make_policy(t).logprobs_and_entropies(minibatch)[1][0].mean() for t in (0.5, 1.0))
    assert cold < warm - 0.01


def gradient_figures(policy: Policy, capacity: int) -> dict[str, float]:
    minibatch = one_minibatch(rollout(), LOSS, capacity)
    old = policy.logprobs(minibatch)
    return policy.step(with_inputs(minibatch, old_logprobs=old, ref_logprobs=[lp - 0.1 for lp in old]), LOSS)


def test_an_update_does_not_depend_on_microbatching(make_policy: MakePolicy) -> None:
    whole, cut = gradient_figures(make_policy(), 10_000), gradient_figures(make_policy(), 60)
    for name in ("loss", "kl", "grad_norm", "ratio"):
        assert cut[name] == pytest.approx(whole[name], rel=2e-5, abs=1e-6), name


def test_an_update_is_adamw_on_the_written_out_objective(
    make_policy: MakePolicy, make_model: Callable[[], BuiltModel]
) -> None:
    """Autograd through single rows, the objective as a Python loop, torch's AdamW."""
    policy = make_policy(optim=OptimSection(lr=1e-2, weight_decay=0.0, clip_grad=1e9))
    module, samples = policy.model.module, rollout(4)
    minibatch = one_minibatch(samples, LOSS)
    old = policy.logprobs(minibatch)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    policy.step(with_inputs(minibatch, old_logprobs=old, ref_logprobs=[lp - 0.1 for lp in old]), LOSS)
    after = {name: p.detach().clone() for name, p in module.named_parameters()}

    twin = make_model().module.train()
    parameters = dict(twin.named_parameters())
    assert all(torch.equal(parameters[name], before[name]) for name in before)
    objective = torch.tensor(0.0)
    for sample, [advantage, *_] in zip(samples, advantages(samples), strict=True):
        tokens, labels = torch.tensor([sample.tokens[:-1]]), torch.tensor([sample.tokens[1:]])
        new = -twin(tokens, torch.arange(tokens.size(1))[None], None, labels=labels)[0]
        new = new[-sample.response_length :]
        ref = new.detach() - 0.1
        ratio = (new - new.detach()).exp()
        kl = (ref - new).exp() - (ref - new) - 1
        objective = objective + (ratio * advantage - 0.1 * kl).mean() / len(samples)
    (-objective).backward()
    adam = torch.optim.AdamW(parameters.values(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    adam.step()
    # Adam's first step is lr * sign(g): entries whose gradient is rounding noise say nothing.
    compared = 0
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        clear = parameter.grad.abs() > 1e-5
        torch.testing.assert_close(after[name][clear], parameter.detach()[clear], atol=2e-5, rtol=0)
        compared += int(clear.sum())
    assert compared > 10_000


def test_warmup_and_cosine_follow_the_formula(make_policy: MakePolicy) -> None:
    policy = make_policy(optim=OptimSection(lr=1e-3, min_lr=1e-4, schedule="cosine", warmup_steps=2, weight_decay=0.0))
    minibatch = one_minibatch(rollout(2), LOSS)
    start = policy.logprobs(minibatch)
    ready = with_inputs(minibatch, old_logprobs=start, ref_logprobs=start)
    rates = [policy.step(ready, LOSS)["lr"] for _ in range(10)]
    half = [0.5 * (1 + torch.cos(torch.tensor(torch.pi * k / 8)).item()) for k in range(1, 9)]
    expected = [5e-4, 1e-3, *[1e-4 + 9e-4 * factor for factor in half]]
    assert rates == pytest.approx(expected, rel=1e-5)


def test_reference_stays_until_refreshed(make_policy: MakePolicy) -> None:
    policy = make_policy()
    reference = Reference(policy, every=2)
    minibatch = one_minibatch(rollout(4), LOSS)
    start = policy.logprobs(minibatch)[0]
    policy.step(with_inputs(minibatch, old_logprobs=[start], ref_logprobs=[start]), LOSS)
    moved = policy.logprobs(minibatch)[0]
    assert (moved - start).abs().max() > 1e-2
    assert torch.equal(reference.logprobs([minibatch])[0][0], start)
    assert torch.equal(policy.logprobs(minibatch)[0], moved), "asking the reference changed the policy"
    assert not reference.refresh(1)
    assert torch.equal(reference.logprobs([minibatch])[0][0], start)
    assert reference.refresh(2)
    assert torch.equal(reference.logprobs([minibatch])[0][0], moved)


def test_a_gradient_that_is_not_finite_stops_the_run(make_policy: MakePolicy) -> None:
    policy = make_policy()
    minibatch = one_minibatch(rollout(2), LOSS)
    before = {name: tensor.clone() for name, tensor in weights(policy.model.module).items()}
    bad = [torch.full_like(lp, float("nan")) for lp in policy.logprobs(minibatch)]
    with pytest.raises(NumericsError, match="the loss is nan, so the update was refused"):
        policy.step(with_inputs(minibatch, old_logprobs=bad, ref_logprobs=bad), LOSS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(policy.model.module).items())
