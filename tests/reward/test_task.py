import pytest

from megatron_r1.config import component
from megatron_r1.errors import ConfigError
from megatron_r1.types import Group, Question, Sample

ENTRY = {"question": "20 + 22 =", "answer": "42", "metadata": {}}
SUM = Question("0", "reasoning_gym", "20 + 22 =", "42", {"config": {"dataset": "chain_sum"}, "entry": ENTRY})


def scores(question: Question, *answers: str, **config: object) -> list[float | None]:
    reward = component.build("reward", {"type": "task", **config})
    texts = [f" <think>a</think> <answer>{answer}</answer>" for answer in answers]
    result: list[float | None] = reward(Group(question, [], [Sample([], [], text, True, 0) for text in texts]))
    return result


def test_the_tasks_own_verifier() -> None:
    assert scores(SUM, "42", " 42.0 ", "+042", "41", "", "forty") == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]


def test_partial_credit_only_on_request() -> None:
    assert scores(SUM, "it is 42") == [0.0]
    [partial] = scores(SUM, "it is 42", partial_credit=True)
    assert partial is not None
    assert 0 < partial < 1


def test_only_answers_in_tags_count() -> None:
    reward = component.build("reward", {"type": "task"})
    assert reward(Group(SUM, [], [Sample([], [], "42", True, 0)])) == [0.0]


def test_an_answer_after_the_reasoning() -> None:
    reward = component.build("reward", {"type": "task", "answer_in": "after_think"})
    samples = [Sample([], [], text, True, 0) for text in ("<think>a</think> 42", "<think>42</think>", "42")]
    assert reward(Group(SUM, [], samples)) == [1.0, 0.0, 0.0]


def test_a_task_without_a_verifier() -> None:
    with pytest.raises(ConfigError):
        scores(Question("0", "no_such_task", "q", "a"), "a")
