import json
from collections import Counter
from typing import Any

import pytest

from megatron_r1.config import component
from megatron_r1.config.sections import TaskSection
from megatron_r1.data.questions import Questions
from megatron_r1.errors import ConfigError
from megatron_r1.types import Question

QUICK = {"knights_knaves": 2.0, "caesar_cipher": 1.0, "coin_flip": 1.0}


def logic(**keys: Any) -> dict[str, Any]:
    return {"type": "logic", "datasets": QUICK, **keys}


def test_shares_and_verifiers_of_several_datasets() -> None:
    questions = Questions(TaskSection(task=logic()), seed=0).take(3, 1000)
    assert Counter(q.metadata["dataset"] for q in questions) == {
        "knights_knaves": 500,
        "caesar_cipher": 250,
        "coin_flip": 250,
    }
    for asked in questions[:40]:
        config = json.loads(json.dumps(asked.metadata))["config"]
        task = component.build("task", {**config, "type": asked.task})
        assert task.verify(asked, asked.answer) == 1.0
        assert task.verify(asked, "no idea at all") < 1.0


def test_the_default_holds_the_kinds_that_r1_names() -> None:
    task = component.build("task", {"type": "logic"})
    assert {"codeio", "caesar_cipher", "zebra_puzzles", "puzzle24", "coin_flip"} <= set(task.config.datasets)
    for index in range(12):
        problem = task.problem(0, index)
        asked = Question("0", "logic", problem.text, problem.answer, json.loads(json.dumps(problem.metadata)))
        assert task.verify(asked, problem.answer) == 1.0


def test_settings_of_one_dataset() -> None:
    def people(**settings: Any) -> set[int]:
        task = component.build("task", logic(datasets={"knights_knaves": 1.0}, settings=settings))
        entries = [task.problem(1, index).metadata["entry"] for index in range(50)]
        return {len(entry["metadata"]["names"]) for entry in entries}

    assert people(knights_knaves={"options": {"n_people": 3}}) == {3}
    assert people(knights_knaves={"level": 3}) == {5}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"datasets": {"knights_and_knaves": 1.0}}, "did you mean 'knights_knaves'"),
        ({"datasets": {}}, "at least 1 item"),
        ({"settings": {"dice": {"level": 1}}}, "settings for 'dice', which is not among the datasets"),
        ({"settings": {"coin_flip": {"levl": 1}}}, "unknown key 'levl', did you mean 'level'"),
        ({"settings": {"coin_flip": {"level": 100}}}, "has the levels 0 to"),
    ],
)
def test_bad_sections(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        component.build("task", logic(**keys))
