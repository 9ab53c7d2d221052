"""Pairs and labelled responses -> the microbatches that one rank feeds its model; a pair is never parted."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from megatron_r1.data.packing import deal, partition
from megatron_r1.loss.base import Loss
from megatron_r1.loss.sequences import SequenceInputs
from megatron_r1.seeds import stream_seed
from megatron_r1.train.batch import MicroBatch, Minibatch, Share, from_row
from megatron_r1.train.layout import lay


@dataclass(frozen=True)
class Text:
    """One sequence: what is fed, what is predicted, and how much of it is judged."""

    tokens: list[int]
    """[seq]"""
    labels: list[int]
    """The token after each. [seq]"""
    judged: int
    """How many of the last positions a loss is given."""


@dataclass(frozen=True)
class Item:
    """What a loss judges as one: the chosen and the rejected text, or one text with its label."""

    texts: tuple[Text, ...]
    stratum: str
    """What kind it is, to be measured apart."""
    label: float | None = None
    reference: tuple[float, ...] | None = None
    """Sum of the judged log-probabilities of each text under the reference policy, nats."""

    @property
    def length(self) -> int:
        """Tokens of all its texts."""
        return sum(len(text.tokens) for text in self.texts)


def by_length(chosen: Text, rejected: Text) -> str:
    """Which of a pair is longer: a model that is right only where the chosen one is has learned length."""
    difference = len(chosen.tokens) - len(rejected.tokens)
    return "chosen_longer" if difference > 0 else "chosen_shorter" if difference < 0 else "same_length"


def batch(items: Sequence[Item], loss: Loss, share: Share) -> Minibatch:
    """Pack this rank's share of `items` so that all of them together weigh 1.

    All ranks call this with the same arguments but `share.rank`; each gets the same number of microbatches. Texts are
    numbered through, item after item: `MicroBatch.samples`.
    """
    texts = [text for item in items for text in item.texts]
    weights = loss.token_weights([text.judged for text in texts])
    starts = [0, *accumulate(len(item.texts) for item in items)]
    hands = deal([item.length for item in items], share.ranks)
    packs = share.packs([[items[i].length for i in hand] for hand in hands])
    mine = hands[share.rank]
    chosen = [[mine[i] for i in pack] for pack in partition([items[i].length for i in mine], packs)]
    length = share.length([[len(text.tokens) for i in pack for text in items[i].texts] for pack in chosen])
    numbered = [[number for i in pack for number in range(starts[i], starts[i + 1])] for pack in chosen]
    return [
        _pack([items[i] for i in pack], numbers, [weights[number] for number in numbers], share, length)
        for pack, numbers in zip(chosen, numbered, strict=True)
    ]


def batches(items: Sequence[Item], size: int, seed: int, epoch: int) -> Iterator[list[Item]]:
    """The items of each optimizer step of one epoch, in an order of its own; the last may be fewer than `size`."""
    order = list(items)
    random.Random(stream_seed("preferences", seed, epoch)).shuffle(order)
    yield from (order[start : start + size] for start in range(0, len(order), size))


def _pack(items: list[Item], numbers: list[int], weights: list[float], share: Share, length: int) -> MicroBatch:
    """Lay the texts of `items` one behind the other. `numbers`, `weights`: of each text and of its tokens. [texts]"""
    texts = [text for item in items for text in item.texts]
    row = lay([text.tokens for text in texts], [text.labels for text in texts], share.alignment, length)
    judged = torch.tensor([text.judged for text in texts], dtype=torch.long)
    selected = [torch.arange(stop - text.judged, stop) for stop, text in zip(row.stops, texts, strict=True)]
    labels = [item.label for item in items if item.label is not None]
    reference = [value for item in items for value in item.reference or ()]
    inputs = SequenceInputs(
        weights=torch.tensor(weights, dtype=torch.float32).repeat_interleave(judged).to(share.device),
        segments=torch.arange(len(texts)).repeat_interleave(judged).to(share.device),
        labels=torch.tensor(labels, dtype=torch.float32, device=share.device),
        reference=torch.tensor(reference, dtype=torch.float32, device=share.device),
    )
    return from_row(row, selected, inputs, share.device, samples=numbers)
