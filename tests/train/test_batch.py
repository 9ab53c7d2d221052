"""Splitting and packing: every sample once, every token in its place, the same work on every rank."""

from collections import Counter

import pytest
import torch

from megatron_r1.loss.grpo import Grpo
from megatron_r1.train.batch import Minibatch, Share, attach, by_sample, split
from tests.train.conftest import rollout

LOSS = Grpo(Grpo.Config())


def parts(minibatches: int, ranks: int, seed: int = 3, capacity: int = 100) -> list[list[Minibatch]]:
    samples = rollout()
    shares = [Share(rank, ranks, capacity, torch.device("cpu")) for rank in range(ranks)]
    return [list(split(samples, minibatches, seed, LOSS, share)) for share in shares]


@pytest.mark.parametrize(("minibatches", "ranks"), [(1, 1), (4, 1), (4, 2), (3, 4)])
def test_every_sample_is_trained_on_once(minibatches: int, ranks: int) -> None:
    expected = Counter(tuple(sample.tokens[-sample.response_length :]) for sample in rollout())
    found: Counter[tuple[int, ...]] = Counter()
    for rank in parts(minibatches, ranks):
        assert len(rank) == minibatches
        for micro in (micro for minibatch in rank for micro in minibatch):
            predicted = micro.labels.flatten()[micro.selected]
            for segment in micro.inputs.segments.unique():
                found[tuple(predicted[micro.inputs.segments == segment].tolist())] += 1
    assert found == expected


def test_ranks_have_equally_many_microbatches_and_weights_sum_to_one() -> None:
    for minibatch in zip(*parts(4, 2), strict=True):
        assert len({len(rank) for rank in minibatch}) == 1
        weights = [micro.inputs.weights.sum() for rank in minibatch for micro in rank]
        assert float(sum(weights)) == pytest.approx(1, abs=1e-6)


def test_packs_keep_to_their_capacity_unless_one_sample_is_longer() -> None:
    for micro in (micro for minibatch in parts(2, 1, capacity=60)[0] for micro in minibatch):
        assert micro.ends is not None
        sequences = micro.ends.numel() - 1
        assert micro.tokens.numel() <= 60 or sequences == 1


def test_the_cut_depends_on_the_seed_alone() -> None:
    def tokens(seed: int) -> list[list[int]]:
        return [micro.tokens.flatten().tolist() for minibatch in parts(4, 1, seed)[0] for micro in minibatch]

    assert tokens(1) == tokens(1) != tokens(2)


def test_a_rank_without_samples_gets_an_idle_pass() -> None:
    samples = rollout(3)
    share = Share(rank=3, ranks=4, capacity=100, device=torch.device("cpu"))
    (minibatch,) = split(samples, 1, 0, LOSS, share)
    assert [micro.selected.numel() for micro in minibatch] == [0] * len(minibatch)


@pytest.mark.parametrize(("minibatches", "ranks"), [(1, 1), (3, 4)])
def test_what_is_attached_to_samples_comes_to_their_tokens_and_back(minibatches: int, ranks: int) -> None:
    """Number `sample + token / 100` for every token: after packing it stands at that token, and is found again."""
    samples = rollout()
    known = [[n + t / 100 for t in range(sample.response_length)] for n, sample in enumerate(samples)]
    found: dict[int, list[float]] = {}
    for minibatch in (minibatch for rank in parts(minibatches, ranks) for minibatch in rank):
        ready = attach(minibatch, advantages=known, returns=[[-x for x in one] for one in known])
        for micro in ready:
            assert micro.inputs.advantages is not None
            assert micro.inputs.returns is not None
            assert torch.equal(micro.inputs.returns, -micro.inputs.advantages)
            predicted = micro.labels.flatten()[micro.selected].tolist()
            at = [(int(x), round(x % 1 * 100)) for x in micro.inputs.advantages.tolist()]
            assert predicted == [samples[n].tokens[-samples[n].response_length + t] for n, t in at]
        values = [micro.inputs.advantages for micro in ready if micro.inputs.advantages is not None]
        found |= {number: piece.tolist() for number, piece in by_sample(ready, values)}
    assert sorted(found) == list(range(len(samples)))
    assert all(found[n] == pytest.approx(numbers, rel=1e-6) for n, numbers in enumerate(known))
