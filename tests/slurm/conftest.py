"""The cluster and the models that the jobs of this folder need."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end import runs
from tests.slurm.cluster import Slurm, lacking


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Four nodes on this machine."""
    if why := lacking():
        pytest.skip(why)
    with Slurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `corpus`, `index`, `tokenizer` and `base` (12 undisturbed steps), made by the verbs."""
    folder = tmp_path_factory.mktemp("prepared")
    runs.prepare(folder)
    return folder
