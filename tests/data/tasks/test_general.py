from pathlib import Path

import pytest

from megatron_r1.errors import DataError
from tests.data.tasks.written import build


def test_a_prompt_has_no_reference(tmp_path: Path) -> None:
    task = build("general", tmp_path, [{"text": "Write a poem.", "language": "en"}], columns={"prompt": "text"})
    problem = task.problem(3, 7)
    assert (problem.text, problem.answer, problem.metadata["language"]) == ("Write a poem.", "", "en")
    assert set(task.default_rewards) == {"format", "language_consistency"}


def test_an_empty_prompt_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 2: column 'prompt' holds ''"):
        build("general", tmp_path, [{"prompt": "a"}, {"prompt": ""}]).row(1)
