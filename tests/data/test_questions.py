import json

import pytest

from megatron_r1.config.sections import TaskSection
from megatron_r1.data.questions import Questions, heldout, texts
from megatron_r1.errors import ConfigError
from tests.data.small_corpus import HELDOUT, TASK


def test_a_step_is_the_same_whatever_was_taken_before() -> None:
    first = Questions(HELDOUT, seed=1)
    steps = [first.take(step, 16) for step in range(3)]
    assert Questions(HELDOUT, seed=1).take(2, 16) == steps[2]
    assert first.take(2, 4) == steps[2][:4]
    assert len({question.id for step in steps for question in step}) == 48


def test_seeds_and_steps_draw_different_questions() -> None:
    draws = [Questions(HELDOUT, seed).take(step, 50) for seed in (0, 1) for step in (0, 1)]
    assert len({tuple(question.prompt for question in draw) for draw in draws}) == 4


def test_excluded_texts_are_skipped() -> None:
    plain = Questions(HELDOUT, seed=0).take(0, 200)
    banned = texts(plain[::2])
    kept = Questions(HELDOUT, seed=0, exclude=banned).take(0, 200)
    assert not banned & texts(kept)
    remaining = [question.prompt for question in plain if question.metadata["text"] not in banned]
    assert [question.prompt for question in kept[: len(remaining)]] == remaining


def test_heldout_is_unique_and_prefix_stable() -> None:
    questions = heldout(HELDOUT, 300)
    assert len(texts(questions)) == 300
    assert heldout(HELDOUT, 100) == questions[:100]


def test_a_question_carries_prompt_answer_and_json() -> None:
    [question] = Questions(HELDOUT, seed=0).take(0, 1)
    expression = question.metadata["entry"]["metadata"]["expression"]
    assert question.prompt == (
        f"User: State the final answer to the following arithmetic problem: {expression} = Assistant:"
    )
    assert int(question.answer) == eval(expression)
    assert question.task == "reasoning_gym"
    assert json.loads(json.dumps(question.metadata))["config"]["dataset"] == "chain_sum"


def test_a_task_that_runs_dry() -> None:
    tiny = TaskSection(task={**TASK, "options": {"min_terms": 1, "max_terms": 1, "min_digits": 1, "max_digits": 1}})
    assert len(heldout(tiny, 10)) == 10
    with pytest.raises(ConfigError, match=r"ran dry.*10 texts are taken"):
        heldout(tiny, 11)
    with pytest.raises(ConfigError, match="ran dry"):
        Questions(tiny, 0, exclude=texts(heldout(tiny, 10))).take(0, 1)
