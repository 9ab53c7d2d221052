"""Routers that are told what to choose: logits and gradients of transformers' model whose routers are told the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from megatron_r1.model.build import BuiltModel, build_model
from megatron_r1.model.routing import PADDING, Routing
from tests.model.conftest import section

ROWS, LENGTH = 2, 32


@pytest.fixture(scope="module")
def model(exported: Path) -> BuiltModel:
    """For this file alone: a router listens to whom it was once told to listen to."""
    made = build_model(section(exported, load_weights=True, balance_loss_coef=0.0), max_sequence_length=128)
    made.module.eval()
    return made


@pytest.fixture(scope="module")
def routing(model: BuiltModel) -> Routing:
    return Routing(model.chunks)


@pytest.fixture(scope="module")
def tokens(model: BuiltModel) -> torch.Tensor:
    return torch.randint(model.hf["vocab_size"], (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def invented(model: BuiltModel) -> torch.Tensor:
    """Distinct experts at random; at dense layers what means nothing. [rows, seq, layers, experts a token]"""
    config, generator = model.config, torch.Generator().manual_seed(4)
    draws = torch.rand(ROWS, LENGTH, config.num_layers, config.num_moe_experts, generator=generator)
    experts = draws.topk(config.moe_router_topk).indices
    experts[:, :, 0] = 0
    return experts.to(torch.uint8)


def losses(
    model: BuiltModel, routing: Routing, tokens: torch.Tensor, experts: torch.Tensor | None, held: int = LENGTH
) -> torch.Tensor:
    """Cross-entropy of every token, with the experts that routers are told. [rows, seq]"""
    rows = torch.arange(ROWS)[:, None].expand(ROWS, LENGTH).clone()
    rows[:, held:] = PADDING
    with routing.of(rows, experts):
        places = torch.arange(LENGTH).expand(ROWS, -1)
        found: torch.Tensor = model.module(tokens[:, :-1], places, None, labels=tokens[:, 1:])
    return found


def routers(model: BuiltModel) -> Iterator[torch.nn.Module]:
    for layer in model.module.decoder.layers[1:]:
        yield layer.mlp.router


@contextmanager
def chosen(model: BuiltModel) -> Iterator[list[torch.Tensor]]:
    """What routers of the trunk choose. [layers with experts][positions, experts], sequence by sequence"""
    found: list[torch.Tensor] = []
    hooks = [router.register_forward_hook(lambda _, __, output: found.append(output[1])) for router in routers(model)]
    yield found
    for hook in hooks:
        hook.remove()


def as_told(model: BuiltModel, maps: list[torch.Tensor]) -> torch.Tensor:
    """Choices in the form in which an engine gives them. [rows, seq, layers, experts a token]"""
    topk = model.config.moe_router_topk
    layers = [made.nonzero()[:, 1].view(LENGTH, ROWS, topk).transpose(0, 1) for made in maps]
    return torch.stack([torch.zeros_like(layers[0]), *layers], dim=2)


def test_its_own_choices_change_nothing(model: BuiltModel, routing: Routing, tokens: torch.Tensor) -> None:
    with torch.no_grad(), chosen(model) as maps:
        expected = losses(model, routing, tokens, None)
        own = as_told(model, maps)
        for told in (own, own.flip(-1)):  # in whatever order, but for the rounding of the sum of a token's scores
            torch.testing.assert_close(losses(model, routing, tokens, told), expected, atol=1e-5, rtol=0)


def test_logits_and_gradients_are_those_of_transformers_told_the_same(
    model: BuiltModel, routing: Routing, tokens: torch.Tensor, invented: torch.Tensor, exported: Path
) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    for number, layer in list(enumerate(theirs.model.layers))[1:]:
        told = invented[:, :, number].flatten(0, 1).long()

        def choose(gate: torch.nn.Module, _: object, output: object, told: torch.Tensor = told) -> object:
            scores = output[0].sigmoid().gather(1, told)  # type: ignore[index]
            weights = scores / scores.sum(1, keepdim=True) * theirs.config.routed_scaling_factor
            return output[0], weights, told  # type: ignore[index]

        layer.mlp.gate.register_forward_hook(choose)
    logits = theirs(tokens[:, :-1]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(ROWS, LENGTH)
    expected.mean().backward()

    config = model.config
    model.module.zero_grad()
    config.mtp_loss_scaling_factor, kept = 0.0, config.mtp_loss_scaling_factor
    found = losses(model, routing, tokens, invented)
    found.mean().backward()
    config.mtp_loss_scaling_factor = kept
    with torch.no_grad():
        assert (found - losses(model, routing, tokens, None)).abs().mean() > 0.05, "experts too alike to tell apart"
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    for router, layer in zip(routers(model), theirs.model.layers[1:], strict=True):
        gradient = layer.mlp.gate.weight.grad
        assert gradient.norm() > 0
        assert (router.weight.grad - gradient).norm() <= 1e-3 * gradient.norm()


def test_the_selection_bias_follows_the_told_experts(
    model: BuiltModel, routing: Routing, tokens: torch.Tensor, invented: torch.Tensor
) -> None:
    """Of tokens; what stands at padding goes round all experts and is not counted."""
    held = LENGTH - 7
    for router in routers(model):
        router.local_tokens_per_expert.zero_()
    with chosen(model) as maps:
        losses(model, routing, tokens, invented, held)
    for number, router in enumerate(routers(model), 1):
        told = invented[:, :held, number].flatten().long().bincount(minlength=model.config.num_moe_experts)
        assert router.local_tokens_per_expert.tolist() == told.tolist()
        padding = maps[number - 1].view(LENGTH, ROWS, -1)[held:]
        assert (padding.sum(-1) == model.config.moe_router_topk).all()
        assert (padding.sum((0, 1)) <= 2 * padding.sum() / padding.size(-1) + 1).all()


def test_a_second_pass_chooses_as_the_first(model: BuiltModel, routing: Routing, invented: torch.Tensor) -> None:
    """Activations that are recomputed: microbatches come back in their order, outside of their forward pass."""
    router = next(routers(model))
    hidden = torch.randn(LENGTH, ROWS, model.config.hidden_size)
    row, told = torch.zeros(ROWS, LENGTH, dtype=torch.long), [invented, invented.flip(1)]
    router.train()
    first = []
    for experts in told:
        with routing.of(row, experts), torch.no_grad():
            first.append(router(hidden)[1])
    second = [router(hidden)[1] for _ in told]
    router.eval()
    assert not torch.equal(first[0], first[1])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(as_told(model, first[:1])[:, :, 1].sort(-1).values, invented[:, :, 1].long().sort(-1).values)


def test_choices_are_compared_without_being_changed(
    model: BuiltModel, routing: Routing, tokens: torch.Tensor, invented: torch.Tensor
) -> None:
    held = LENGTH - 5
    with torch.no_grad(), chosen(model) as maps:
        expected = losses(model, routing, tokens, None)
        own = as_told(model, maps).sort(-1).values
        mixed = own.clone()
        mixed[:, ::3] = invented[:, ::3].long()
        with routing.compared() as found:
            assert torch.equal(losses(model, routing, tokens, mixed, held), expected)
    differing = (mixed.sort(-1).values != own).any(-1)
    differing[:, held:] = False
    assert differing.any()
    for number, layer in enumerate(found.values(), 1):
        assert torch.equal(layer[0].view(LENGTH, ROWS).T, differing[:, :, number])
    assert list(found) == list(range(2, model.config.num_layers + 1))
