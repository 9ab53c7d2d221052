import json
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config import component
from megatron_r1.config.load import dump, validate
from megatron_r1.config.sections import TaskSection
from megatron_r1.data.questions import Questions, heldout, texts
from megatron_r1.data.tasks.mixture import Mixture
from megatron_r1.errors import ConfigError
from tests.data.small_corpus import TASK
from tests.data.tasks.written import write

MATH = [{"problem": f"What is {n}?", "answer": str(n)} for n in range(30)]


def mixture(folder: Path, **members: dict[str, Any]) -> TaskSection:
    source = write(folder / "math.jsonl", MATH)
    parts = {"sums": {**TASK, "weight": 3.0}, "book": {"type": "math", "source": source}}
    merged = {name: parts.get(name, {}) | members.get(name, {}) for name in [*parts, *members]}
    return TaskSection(task={"type": "mixture", "tasks": merged})


def test_exact_shares_and_names(tmp_path: Path) -> None:
    questions = Questions(mixture(tmp_path), seed=1).take(2, 1000)
    assert Counter(question.metadata["member"] for question in questions) == {"sums": 750, "book": 250}
    assert {question.id.rpartition("-")[0] for question in questions} == {"sums", "book"}
    assert len({question.id for question in questions}) == 1000


def test_any_order_of_drawing_gives_the_same_problems(tmp_path: Path) -> None:
    section = mixture(tmp_path).task
    forwards = [component.build("task", section).problem(3, index) for index in range(0, 3000, 111)]
    task = component.build("task", section)
    assert [task.problem(3, index) for index in reversed(range(0, 3000, 111))] == forwards[::-1]


def test_a_question_is_scored_as_its_member_alone_would_be(tmp_path: Path) -> None:
    section = mixture(tmp_path, book={"template": "boxed"}, sums={"rewards": ["task", "length"]})
    for question in Questions(section, seed=1).take(0, 50):
        config = json.loads(json.dumps(question.metadata))["config"]
        if question.metadata["member"] == "sums":
            assert (question.task, config["dataset"]) == ("reasoning_gym", "chain_sum")
            assert question.rewards == ("task", "length")
            assert question.prompt.startswith("What follows is a conversation")
            assert component.build("task", {**config, "type": question.task}).verify(question, question.answer) == 1.0
        else:
            assert (question.task, question.rewards) == ("math", ("accuracy", "format"))
            assert question.prompt == (
                f"User: What is {question.answer}?\nPlease reason step by step, and put your final answer within "
                "\\boxed{}.\n\nAssistant:"
            )
        assert not {"weight", "template", "rewards"} & set(config)
        component.build("task", {**config, "type": question.task})


def test_the_template_of_the_run_serves_members_without_one(tmp_path: Path) -> None:
    section = mixture(tmp_path, book={"template": "boxed"}).model_copy(update={"template": "Q: {question} A:"})
    prompts = {question.metadata["member"]: question.prompt for question in Questions(section, 0).take(0, 30)}
    assert prompts["sums"].startswith("Q: ")
    assert prompts["book"].startswith("User: ")


def test_default_rewards_are_those_of_all_members(tmp_path: Path) -> None:
    task = component.build("task", mixture(tmp_path).task)
    assert task.default_rewards == {
        "task": {"type": "task"},
        "format": {"type": "format"},
        "accuracy": {"type": "accuracy"},
    }
    assert Mixture.default_rewards == {}


def test_heldout_problems_of_a_member_are_never_trained_on_and_the_rest_come_once_an_epoch(tmp_path: Path) -> None:
    section = mixture(tmp_path)
    banned = texts(heldout(TaskSection(task={"type": "math", "source": str(tmp_path / "math.jsonl")}), 10))
    stream = Questions(section, seed=4, exclude=banned)
    book = [q for step in range(4) for q in stream.take(step, 1000) if q.metadata["member"] == "book"]
    assert len(book) == 1000
    for epoch in range(0, 1000 - 20, 20):
        assert {q.metadata["text"] for q in book[epoch : epoch + 20]} == {row["problem"] for row in MATH} - banned


def test_survives_the_run_file_that_it_is_written_to(tmp_path: Path) -> None:
    section = mixture(tmp_path, book={"rewards": ["accuracy"], "weight": 2.0})
    again = validate(TaskSection, tomllib.loads(dump(section)), where="again")
    assert again == section
    assert Questions(again, 7).take(1, 40) == Questions(section, 7).take(1, 40)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"more": {"type": "mixture", "tasks": {"a": TASK}}}, "a mixture within a mixture"),
        ({"more": {"type": "megatron_r1.data.tasks.mixture:Mixture", "tasks": {"a": TASK}}}, "within a mixture"),
        ({"book": {"weight": 0}}, "weight: Input should be greater than 0"),
        ({"book": {"weigth": 2.0}}, "unknown key 'weigth'"),
        ({"sums": {"dataset": "chain_sums"}}, "did you mean 'chain_sum'"),
        ({"more": {"weight": 1.0}}, "needs a `type`"),
        ({"sums": {"weight": 1e6}}, "'book' with weight 1 of 1e.06 comes to less than"),
    ],
)
def test_bad_members(members: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Questions(mixture(tmp_path, **members), 0)


def test_default_rewards_that_clash(tmp_path: Path) -> None:
    strict = {"type": "tests.data.tasks.written:Strict", "source": "strict.jsonl"}
    with pytest.raises(ConfigError, match="'strict' and another member both have a default reward 'format', with diff"):
        component.build("task", mixture(tmp_path, strict=strict).task)


def test_no_members() -> None:
    with pytest.raises(ConfigError, match="tasks: Dictionary should have at least 1 item"):
        component.build("task", {"type": "mixture", "tasks": {}})
