"""A small rollout as lists, for losses written as loops, and as the tensors that the losses take."""

from dataclasses import dataclass, replace

import torch

from megatron_r1.loss.base import Loss, LossInputs

LENGTHS = [1, 3, 7, 2]


@dataclass(frozen=True)
class Response:
    """One sampled response; one number a token."""

    new: list[float]
    old: list[float]
    ref: list[float]
    advantages: list[float]


def responses(seed: int, spread: float = 0.7) -> list[Response]:
    """Responses of unequal length whose new log-probabilities are some way from the old."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int, scale: float) -> list[float]:
        return (scale * torch.randn(n, generator=generator, dtype=torch.float64)).tolist()

    made = []
    for n in LENGTHS:
        old = [-1 - abs(number) for number in draw(n, 1)]
        new = [a + b for a, b in zip(old, draw(n, spread), strict=True)]
        ref = [a + b for a, b in zip(old, draw(n, 0.3), strict=True)]
        made.append(Response(new, old, ref, draw(n, 1)))
    return made


def with_one_advantage(made: list[Response]) -> list[Response]:
    """The same, every token of a response having the advantage of its first."""
    return [replace(one, advantages=[one.advantages[0]] * len(one.advantages)) for one in made]


def tensors(loss: Loss, made: list[Response]) -> tuple[torch.Tensor, LossInputs]:
    """What a loss is called with, as one microbatch that is the whole minibatch."""

    def flat(name: str) -> torch.Tensor:
        return torch.tensor([number for one in made for number in getattr(one, name)], dtype=torch.float64)

    lengths = [len(one.new) for one in made]
    counts = torch.tensor(lengths)
    return flat("new").requires_grad_(), LossInputs(
        weights=torch.tensor(loss.token_weights(lengths), dtype=torch.float64).repeat_interleave(counts),
        segments=torch.arange(len(made)).repeat_interleave(counts),
        advantages=flat("advantages"),
        old_logprobs=flat("old"),
        ref_logprobs=flat("ref"),
    )
