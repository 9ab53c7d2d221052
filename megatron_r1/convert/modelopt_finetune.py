"""Quantisation-aware training of a Hugging Face model that nvidia-modelopt has prepared: it rounds as the result will.

Forward passes use the rounded weights and activations, the gradient goes through the rounding as if it were not there
(the straight-through estimator, arXiv 1308.3432), and the weights that are updated stay in float32: one step moves a
weight by far less than the distance between two numbers of a few bits. The scales stay those of the calibration.
"""

import random
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from megatron_r1.config.modelopt import QuantizeConfig

BETAS = (0.9, 0.95)
CLIP = 1.0
"""Global gradient norm."""
_IGNORED = -100
"""The label that transformers leaves out of the mean."""


def finetune(model: PreTrainedModel, config: QuantizeConfig, texts: Sequence[list[int]]) -> list[float]:
    """Train on the next token of each text, the rate falling linearly to 0.

    Args:
        model: in float32, fake-quantised; trained in place.
        config: says how many steps, texts a step, the rate and the seed of their order.
        texts: token ids, two at least in each.

    Returns:
        The mean loss of each step, nats a token.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.finetune_lr, betas=BETAS, weight_decay=0.0)
    steps = config.finetune_steps
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    order, losses = _endless(texts, config.seed), []
    for _ in range(steps):
        loss = _loss(model, [next(order) for _ in range(config.finetune_batch)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def mean_loss(model: PreTrainedModel, texts: Sequence[list[int]]) -> float:
    """Cross-entropy over all tokens but the first of each text, nats a token."""
    counts = [len(text) - 1 for text in texts]
    sums = [float(_loss(model, [text])) * count for text, count in zip(texts, counts, strict=True)]
    return sum(sums) / sum(counts)


def _loss(model: PreTrainedModel, texts: Sequence[list[int]]) -> torch.Tensor:
    """The mean over the tokens of all texts, padded behind their ends."""
    shape = len(texts), max(map(len, texts))
    tokens, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, _IGNORED)
    mask = torch.zeros(shape, dtype=torch.long)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = labels[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
    device = model.device
    output = model(input_ids=tokens.to(device), attention_mask=mask.to(device), labels=labels.to(device))
    loss: torch.Tensor = output.loss
    return loss


def _endless(texts: Sequence[list[int]], seed: int) -> Iterator[list[int]]:
    """All texts in a random order, then in another."""
    generator = random.Random(seed)
    while True:
        yield from generator.sample(texts, len(texts))
