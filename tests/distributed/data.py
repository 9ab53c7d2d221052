"""What the layouts are fed, made so that mistakes show.

Sequences and the numbers of tokens that count are unequal, batches do not divide by the ranks (some ranks are left with
nothing), and one group's rewards are all the same.
"""

import random

import numpy as np
import torch

from megatron_r1.train.batch import Trajectory
from megatron_r1.train.preference_batch import Item, Text
from megatron_r1.types import Group, Question, Sample
from tests.distributed.models import VOCABULARY

ROWS, LENGTH = 8, 32
BATCHES = [9, 3, 1, 8, 5]
"""Rows of each step of fine-tuning: 1 leaves other ranks without any."""
QUESTIONS, SAMPLES = 5, 3


def corpus_rows(step: int) -> torch.Tensor:
    """[rows, seq + 1]"""
    return torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))


def _tokens(rng: random.Random, fewest: int, most: int) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(rng.randint(fewest, most))]


def chats(step: int) -> list[Trajectory]:
    """Prompts of 2 to 9 tokens; responses of 1 to 40, every third of a single token."""
    rng = random.Random(step)
    made = []
    for number in range(BATCHES[step % len(BATCHES)]):
        prompt, response = _tokens(rng, 2, 9), _tokens(rng, 1, 1 if number % 3 == 2 else 40)
        made.append(Trajectory(prompt + response, len(response)))
    return made


def groups(step: int) -> list[Group]:
    """Responses of 1 to 24 tokens. A reward depends on the first token; those of the last question are all 1."""
    rng = random.Random(step)
    made = []
    for number in range(QUESTIONS):
        responses = [_tokens(rng, 1, 24) for _ in range(SAMPLES)]
        rewards = [1.0 if number == QUESTIONS - 1 else tokens[0] / VOCABULARY for tokens in responses]
        samples = [
            Sample(tokens, [-6.0] * len(tokens), "", True, 0, reward=reward)
            for tokens, reward in zip(responses, rewards, strict=True)
        ]
        made.append(Group(Question("q", "task", "?", "!"), _tokens(rng, 2, 9), samples))
    return made


def recorded(rollout: list[Group], layers: int, experts: int, chosen: int) -> list[Group]:
    """The same, with distinct experts at random for each token, as an engine would have recorded them."""
    draw = np.random.default_rng(len(rollout))
    for group in rollout:
        for sample in group.samples:
            length = len(group.prompt_tokens) + len(sample.tokens) - 1
            order = draw.random((length, layers, experts)).argsort(-1)
            sample.routed_experts = order[..., :chosen].astype(np.uint8)
    return rollout


def pairs(step: int, whole: bool = False) -> list[Item]:
    """Three pairs, judged at their last tokens, or at all tokens of their responses."""
    rng = random.Random(step)

    def text(prompt: list[int]) -> Text:
        response = _tokens(rng, 1, 20)
        tokens = prompt + response
        return Text(tokens[:-1], tokens[1:], len(response)) if whole else Text(tokens, labels=tokens, judged=1)

    prompts = [_tokens(rng, 2, 9) for _ in range(3)]
    return [Item((text(prompt), text(prompt)), stratum="") for prompt in prompts]
