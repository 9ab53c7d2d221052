"""Groups of responses with given rewards."""

from collections.abc import Sequence

from megatron_r1.types import Group, Question, Sample


def group(rewards: Sequence[float], lengths: Sequence[int] = ()) -> Group:
    """One question's responses, of one token each unless `lengths` says otherwise."""
    counts = lengths or [1] * len(rewards)
    samples = [
        Sample([1] * count, [0.0] * count, "", True, 0, reward=reward)
        for reward, count in zip(rewards, counts, strict=True)
    ]
    return Group(Question("q", "task", "?", "!"), [1], samples)
