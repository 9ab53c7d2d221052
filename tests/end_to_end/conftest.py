"""What the runs of this folder start from: corpus, tokenizer and a base model that was trained for seconds."""

from pathlib import Path

import pytest

from tests.end_to_end import runs


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `corpus`, `index`, `tokenizer` and `base` (12 undisturbed steps), made by the verbs."""
    folder = tmp_path_factory.mktemp("prepared")
    runs.prepare(folder)
    return folder
