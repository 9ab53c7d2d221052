"""What routers count of packed rows, beside the formula written out and the same sequences one by one."""

from itertools import pairwise

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_r1.model.build import BuiltModel, build_model
from megatron_r1.model.routing import PADDING, Routing
from tests.model.conftest import section

ALPHA = 0.3
LENGTHS = (5, 12, 7)
ROW = torch.tensor([number for number, length in enumerate(LENGTHS) for _ in range(length)])


@pytest.fixture
def model(built: BuiltModel) -> BuiltModel:
    del built  # its parallel state
    made = build_model(section(balance_loss_coef=ALPHA), max_sequence_length=128)
    made.module.train()
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    return made


def router_of(model: BuiltModel) -> torch.nn.Module:
    router: torch.nn.Module = model.module.decoder.layers[1].mlp.router
    return router


def gradient(model: BuiltModel, hidden: torch.Tensor, sequences: torch.Tensor) -> torch.Tensor:
    """Of the router's matrix, by the balance loss alone."""
    routing, router = Routing(model.chunks), router_of(model)
    router.zero_grad()
    with routing.of(sequences[None]):
        probs, _ = router(hidden[:, None])
    (probs * 0).sum().backward()
    grad = router.weight.grad
    assert grad is not None
    return grad.clone()


def written_out(model: BuiltModel, hidden: torch.Tensor) -> torch.Tensor:
    """The same of T x alpha sum_i f_i P_i of one sequence (DeepSeek-V3, eq. 17-20); f knows no bias and no groups."""
    router, config = router_of(model), model.config
    weight = router.weight.detach().clone().requires_grad_()
    scores = (hidden @ weight.T).sigmoid()
    chosen = torch.zeros_like(scores).scatter(1, scores.topk(config.moe_router_topk, dim=1).indices, 1)
    share = (scores / scores.sum(-1, keepdim=True)).mean(0)
    frequency = config.num_moe_experts / (config.moe_router_topk * len(hidden)) * chosen.sum(0)
    (len(hidden) * ALPHA * (frequency * share).sum()).backward()
    assert weight.grad is not None
    return weight.grad


def states(model: BuiltModel) -> torch.Tensor:
    return torch.randn(len(ROW), model.config.hidden_size, generator=torch.Generator().manual_seed(0))


def test_the_balance_loss_of_a_sequence_is_the_papers(model: BuiltModel) -> None:
    hidden = states(model)
    torch.testing.assert_close(
        gradient(model, hidden, torch.zeros(len(ROW), dtype=torch.long)), written_out(model, hidden)
    )


def test_packed_sequences_are_balanced_one_by_one(model: BuiltModel) -> None:
    hidden = states(model)
    ends = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    one_by_one = [written_out(model, hidden[start:end]) for start, end in pairwise(ends)]
    packed = gradient(model, hidden, ROW)
    torch.testing.assert_close(packed, torch.stack(one_by_one).sum(0))
    assert not torch.allclose(packed, written_out(model, hidden), rtol=1e-2)  # as one sequence it is another loss


def test_padding_is_not_counted(model: BuiltModel) -> None:
    hidden, router = states(model), router_of(model)
    gap = torch.cat([hidden[:17], torch.full((4, hidden.size(1)), 7.0), hidden[17:]])
    numbers = torch.cat([ROW[:17], torch.full((4,), PADDING), ROW[17:]])
    counts = []
    for values, sequences in ((hidden, ROW), (gap, numbers)):
        router.local_tokens_per_expert.zero_()
        counts.append((gradient(model, values, sequences), router.local_tokens_per_expert.clone()))
    torch.testing.assert_close(counts[0], counts[1])
    assert counts[0][1].sum() == len(ROW) * model.config.moe_router_topk


def test_a_row_of_padding_alone_has_no_loss(model: BuiltModel) -> None:
    assert not gradient(model, states(model), torch.full((len(ROW),), PADDING)).any()


def test_a_second_pass_counts_as_the_first_would_have(model: BuiltModel) -> None:
    """Activations that are recomputed: first without gradients, then in the backward pass, in the same order."""
    hidden, router, routing = states(model), router_of(model), Routing(model.chunks)
    router.local_tokens_per_expert.zero_()
    rows = [torch.where(torch.arange(len(ROW)) < kept, 0, PADDING) for kept in (3, 11)]
    for row in rows:
        with routing.of(row[None]), torch.no_grad():
            router(hidden[:, None])
    assert not router.local_tokens_per_expert.any()
    seen = []
    for _ in rows:
        router(hidden[:, None])
        seen.append(int(router.local_tokens_per_expert.sum()) // model.config.moe_router_topk)
    assert seen == [3, 3 + 11]
