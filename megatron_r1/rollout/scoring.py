"""Questions -> scored groups: each group goes to the judge as soon as it is complete, while others are generated."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

from megatron_r1.reward.judge import Judge
from megatron_r1.types import Group, Question, Sample


def scored_groups(
    stream: Iterator[tuple[int, list[Sample]]],
    judge: Judge,
    questions: Sequence[Question],
    prompts: Sequence[list[int]],
    phase: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
) -> list[Group]:
    """Judged samples of each question, in the order of the questions.

    Args:
        stream: of an engine (`Engine.stream`): the number of a prompt and its samples, in any order.
        judge: scores them.
        questions: what is asked.
        prompts: token ids of each question's prompt. [questions][tokens]
        phase: times "rollout", and "reward", the part of the scoring that is left when the last sample is there.
    """
    groups: dict[int, Group] = {}
    sitting = judge.sitting()
    with phase("rollout"):
        for index, samples in stream:
            groups[index] = Group(questions[index], prompts[index], samples)
            sitting.submit(groups[index])
    with phase("reward"):
        sitting.finish()
    return [groups[index] for index in range(len(questions))]
