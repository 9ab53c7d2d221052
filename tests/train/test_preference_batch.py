"""Pairs as microbatches: never parted, weighing 1 together, and the same update however they are cut."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_r1.config.sections import ParallelSection, PolicySection
from megatron_r1.loss.dpo import Dpo
from megatron_r1.loss.pairwise import Pairwise
from megatron_r1.model.build import build_model
from megatron_r1.model.mapping import weights
from megatron_r1.model.parallel import initialize
from megatron_r1.train.batch import Share
from megatron_r1.train.dpo import with_reference
from megatron_r1.train.policy import Policy
from megatron_r1.train.preference_batch import Item, Text, batch, batches
from megatron_r1.train.preference_loop import Data
from megatron_r1.train.scorer import Scorer
from tests.train.conftest import OPTIM
from tests.train.preference_runs import model_folder

LOSS = Pairwise()


def share(capacity: int = 10_000, rank: int = 0, ranks: int = 1) -> Share:
    return Share(rank, ranks, capacity, torch.device("cpu"))


def scored_items(count: int = 10, seed: int = 0) -> list[Item]:
    rng = random.Random(seed)

    def text() -> Text:
        tokens = [rng.randrange(4, 400) for _ in range(rng.randint(4, 30))]
        return Text(tokens, tokens, judged=1)

    return [Item((text(), text()), "any") for _ in range(count)]


def answered_items(count: int = 10, seed: int = 0) -> list[Item]:
    rng = random.Random(seed)

    def text() -> Text:
        tokens = [rng.randrange(4, 400) for _ in range(rng.randint(6, 30))]
        return Text(tokens[:-1], tokens[1:], judged=rng.randint(1, 5))

    return [Item((text(), text()), "any") for _ in range(count)]


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_pair_once_whole_and_all_weigh_one(ranks: int) -> None:
    items = scored_items(11)
    parts = [batch(items, LOSS, share(70, rank, ranks)) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    micros = [micro for part in parts for micro in part]
    numbers = [number for micro in micros for number in micro.samples]
    assert sorted(numbers) == list(range(22))
    for micro in micros:
        assert [number ^ 1 for number in micro.samples[::2]] == micro.samples[1::2]
        ends = micro.inputs.segments.numel() and micro.ends[1:] - 1
        assert micro.inputs.segments.numel() == 0 or micro.selected.tolist() == ends.tolist()
        found = [micro.tokens[0, a:b].tolist() for a, b in zip(micro.ends[:-1], micro.ends[1:], strict=True)]
        texts = [text.tokens for item in items for text in item.texts]
        assert not micro.samples or found == [texts[number] for number in micro.samples]
    assert sum(float(micro.inputs.weights.sum()) for micro in micros) == pytest.approx(1)


def test_more_ranks_than_pairs_leaves_idle_passes() -> None:
    part = batch(scored_items(1), LOSS, share(70, rank=1, ranks=2))
    assert [micro.samples for micro in part] == [[]]
    assert part[0].selected.numel() == 0


def test_batches_hold_every_item_once_an_epoch_in_another_order() -> None:
    items = scored_items(10)
    first, second = (list(batches(items, 4, 0, epoch)) for epoch in (0, 1))
    assert [len(part) for part in first] == [4, 4, 2]
    ids = [[id(item) for part in epoch for item in part] for epoch in (first, second)]
    assert sorted(ids[0]) == sorted(ids[1]) == sorted(map(id, items))
    assert ids[0] != ids[1]
    assert first == list(batches(items, 4, 0, 0))


def make_scorer(folder: Path) -> Scorer:
    """The same scorer at every call. With eps = 1 an update is nearly the gradient itself."""
    initialize(ParallelSection(), seed=7)
    section = PolicySection(path=model_folder(folder), load_weights=False, dtype="float32", init_std=0.08)
    return Scorer(build_model(section, 128, head="scalar"), OPTIM.model_copy(update={"eps": 1.0}), updates=10)


def test_the_update_does_not_depend_on_the_packs(tmp_path: Path) -> None:
    items = scored_items(8)
    found = []
    for capacity in (10_000, 90):
        scorer = make_scorer(tmp_path)
        minibatch = batch(items, LOSS, share(capacity))
        figures = [scorer.step(minibatch, LOSS) for _ in range(2)]
        found.append((len(minibatch), figures, weights(scorer.model.module)))
    (packs, figures, ours), (more_packs, others, theirs) = found
    assert packs == 1
    assert more_packs > 3
    for one, other in zip(figures, others, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert figures[1]["loss"] < figures[0]["loss"]
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=0, msg=name)


def test_the_parts_of_all_ranks_add_up(tmp_path: Path) -> None:
    items, scorer = scored_items(9), make_scorer(tmp_path)
    whole = scorer.evaluate(batch(items, LOSS, share()), LOSS)
    parts = [scorer.evaluate(batch(items, LOSS, share(90, rank, 4)), LOSS) for rank in range(4)]
    assert {name: sum(part[name] for part in parts) for name in whole} == pytest.approx(whole, rel=1e-5)


def test_reference_is_the_policys_own_logprobs(make_policy: Callable[..., Policy]) -> None:
    """Each text alone through the model, its judged log-probabilities summed."""
    policy, items, loss = make_policy(), answered_items(6), Dpo(beta=0.1)
    found = with_reference(policy, items, loss, share(80))
    assert [item.texts for item in found] == [item.texts for item in items]
    for item in found:
        assert item.reference is not None
        for text, reference in zip(item.texts, item.reference, strict=True):
            tokens = torch.tensor([text.tokens])
            with torch.no_grad():
                logits = policy.model.module(tokens, torch.arange(tokens.size(1))[None], None)
            logprobs = torch.log_softmax(logits[0, -text.judged :], -1)
            labels = torch.tensor(text.labels[-text.judged :])[:, None]
            assert reference == pytest.approx(logprobs.gather(1, labels).sum().item(), abs=1e-4)
    figures = policy.evaluate(batch(found, loss, share(130)), loss)
    assert figures["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert figures["accuracy"] == pytest.approx(0.5)


def test_other_preferences_are_another_run() -> None:
    def data(last: int, label: float | None = None) -> Data:
        return Data([Item((Text([1, 2, last], [2, last, 0], 2),), "safe", label)], [], {})

    assert data(3).digest() == data(3).digest()
    assert len({data(3).digest(), data(4).digest(), data(3, 1.0).digest()}) == 3
