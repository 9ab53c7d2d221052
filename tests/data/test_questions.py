import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_r1.config.sections import TaskSection
from megatron_r1.data.questions import Questions, heldout, texts
from megatron_r1.errors import ConfigError
from tests.data.small_corpus import HELDOUT, TASK


def test_a_step_is_the_same_whatever_was_taken_before() -> None:
    first = Questions(HELDOUT, seed=1)
    steps = [first.take(step, 16) for step in range(3)]
    assert Questions(HELDOUT, seed=1).take(2, 16) == steps[2]
    assert first.take(0, 48) == [question for step in steps for question in step]
    assert len({question.id for step in steps for question in step}) == 48


def test_seeds_and_steps_draw_different_questions() -> None:
    draws = [Questions(HELDOUT, seed).take(step, 50) for seed in (0, 1) for step in (0, 1)]
    assert len({tuple(question.prompt for question in draw) for draw in draws}) == 4


def test_excluded_texts_are_replaced_and_the_others_stay_where_they_are() -> None:
    plain = Questions(HELDOUT, seed=0).take(0, 200)
    banned = texts(plain[::2])
    kept = Questions(HELDOUT, seed=0, exclude=banned).take(0, 200)
    assert not banned & texts(kept)
    assert all(new == old for new, old in zip(kept, plain, strict=True) if old.metadata["text"] not in banned)
    assert len(texts(kept[::2])) > 90  # the substitutes differ from one another
    assert (
        Questions(HELDOUT, seed=0, exclude=banned).take(7, 10)
        == Questions(HELDOUT, seed=0, exclude=banned).take(0, 80)[70:]
    )


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


def numbers(folder: Path, count: int) -> TaskSection:
    rows = [{"problem": f"What is {n}?", "answer": str(n)} for n in range(count)]
    (folder / "numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TaskSection(task={"type": "math", "source": str(folder / "numbers.jsonl")})


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(1, 30), st.integers(0, 29), st.integers(1, 12), st.integers(0, 9), st.randoms())
def test_every_row_that_is_not_held_out_comes_once_an_epoch(
    tmp_path: Path, count: int, held: int, n: int, seed: int, order: random.Random
) -> None:
    section = numbers(tmp_path, count)
    exam = heldout(section, min(held, count - 1))
    train = count - len(exam)
    steps = list(range(-(-3 * train // n)))  # three epochs
    drawn = {}
    for step in order.sample(steps, len(steps)):  # whatever was taken before
        fresh = Questions(section, seed, exclude=texts(exam))
        drawn[step] = [question.answer for question in fresh.take(step, n)]
    answers = [answer for step in steps for answer in drawn[step]]
    allowed = {str(number) for number in range(count)} - {question.answer for question in exam}
    for epoch in range(3):
        assert Counter(answers[epoch * train : (epoch + 1) * train]) == dict.fromkeys(allowed, 1)


def test_heldout_rows_are_the_same_for_every_run_and_not_the_first_of_the_file(tmp_path: Path) -> None:
    section = numbers(tmp_path, 100)
    exam = [question.answer for question in heldout(section, 20)]
    assert exam == [question.answer for question in heldout(numbers(tmp_path, 100), 20)]
    assert len(set(exam)) == 20
    assert exam != sorted(exam, key=int)
    with pytest.raises(ConfigError, match=r"task 'math' ran dry.*100 texts are taken"):
        heldout(section, 101)
    with pytest.raises(ConfigError, match="task 'math' ran dry"):
        Questions(section, 0, exclude=texts(heldout(section, 100)))


def test_a_text_that_stands_in_two_rows_is_held_out_of_both(tmp_path: Path) -> None:
    section = numbers(tmp_path, 10)
    with (tmp_path / "numbers.jsonl").open("a") as file:
        file.write('{"problem": "What is 3?", "answer": "three"}\n')
    answers = {q.answer for q in Questions(section, 0, exclude=frozenset({"What is 3?"})).take(0, 90)}
    assert answers == {str(n) for n in range(10)} - {"3"}


def test_the_template_is_the_sections_or_the_tasks(tmp_path: Path) -> None:
    section = numbers(tmp_path, 3)
    [question] = Questions(section, 0).take(0, 1)
    assert question.prompt.endswith(f"User: {question.metadata['text']}. Assistant:")
    [short] = Questions(section.model_copy(update={"template": "r1_zero_short"}), 0).take(0, 1)
    assert short.prompt == f"User: {question.metadata['text']} Assistant:"
    assert question.rewards is None


def test_a_task_that_runs_dry() -> None:
    tiny = TaskSection(task={**TASK, "options": {"min_terms": 1, "max_terms": 1, "min_digits": 1, "max_digits": 1}})
    assert len(heldout(tiny, 10)) == 10
    with pytest.raises(ConfigError, match=r"ran dry.*10 texts are taken"):
        heldout(tiny, 11)
    with pytest.raises(ConfigError, match="ran dry"):
        Questions(tiny, 0, exclude=texts(heldout(tiny, 10))).take(0, 1)
