"""What every reward keeps to; `--component` runs this on yours."""

import copy
import math
from dataclasses import replace
from typing import Any

from megatron_r1.config import component
from megatron_r1.registry import BUILT_IN
from megatron_r1.reward.base import Reward
from megatron_r1.reward.judge import Judge
from megatron_r1.types import Group, Question
from tests.contracts.built_in import REWARDS
from tests.contracts.conftest import refuses_unknown_keys
from tests.contracts.groups import QUESTIONS, RESPONSES, group


def questions(reward_section: dict[str, Any]) -> list[Question]:
    """Those that the reward may meet: a task's verifier is only asked about what that task made."""
    return [q for q in QUESTIONS if reward_section["type"] != "task" or q.task == "reasoning_gym"]


def score(reward: Reward, asked: Group) -> list[float | None]:
    """As the judge calls it: a reward with workers gets one sample at a time, without its tokens."""
    if not reward.isolated:
        return reward(asked)
    singles = [replace(sample, tokens=[], logprobs=[]) for sample in asked.samples]
    return [value for sample in singles for value in reward(Group(asked.question, [], [sample]))]


def test_every_built_in_is_held_to_the_contract() -> None:
    assert {part["type"] for part in REWARDS} == set(BUILT_IN["reward"])


def test_unknown_keys_are_refused(reward_section: dict[str, Any]) -> None:
    assert refuses_unknown_keys("reward", reward_section)


def test_a_completed_section_builds_the_same_reward(reward_section: dict[str, Any], reward: Reward) -> None:
    again = component.build("reward", component.complete("reward", reward_section))
    assert again.config == reward.config


def test_one_finite_number_or_none_a_sample(reward_section: dict[str, Any], reward: Reward) -> None:
    for question in questions(reward_section):
        scores = score(reward, group(question))
        assert len(scores) == len(RESPONSES)
        assert all(value is None or math.isfinite(value) for value in scores), question.id


def test_scores_repeat_and_leave_the_group_as_it_was(reward_section: dict[str, Any], reward: Reward) -> None:
    for question in questions(reward_section):
        asked = group(question)
        before = copy.deepcopy(asked)
        first = score(reward, asked)
        for sample, unmarked in zip(asked.samples, before.samples, strict=True):
            unmarked.step_marks = sample.step_marks  # the one thing beside its score that a reward may say
        assert asked == before, question.id
        assert score(reward, asked) == first == score(component.build("reward", reward_section), asked), question.id


def test_scores_follow_their_samples(reward_section: dict[str, Any], reward: Reward) -> None:
    for question in questions(reward_section):
        asked = group(question)
        backwards = replace(asked, samples=asked.samples[::-1])
        assert score(reward, backwards) == score(reward, asked)[::-1], question.id


def test_a_group_of_one(reward_section: dict[str, Any], reward: Reward) -> None:
    assert len(score(reward, group(questions(reward_section)[0], RESPONSES[:1]))) == 1


def test_through_the_judge(reward_section: dict[str, Any], reward: Reward) -> None:
    """The judge's parts are the reward's scores, whether it runs here or in a worker."""
    groups = [group(question, RESPONSES[:4]) for question in questions(reward_section)]
    expected = [score(reward, asked) for asked in groups]
    with Judge({"it": {**reward_section, "weight": 2.0}}, workers=1, timeout=60.0) as judge:
        judge(groups)
    assert [[sample.rewards["it"] for sample in asked.samples] for asked in groups] == expected
    assert [[sample.reward for sample in asked.samples] for asked in groups] == [
        [2.0 * (value or 0.0) for value in values] for values in expected
    ]
    assert not judge.counters.total()
