"""`pytest -q tests/gpu`: what needs a GPU, in under ten minutes on one H100.

With `--junitxml=gpu.xml` the file holds the figures that the tests measured (`record_property`).
"""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_r1.config.sections import ParallelSection
from megatron_r1.model.parallel import initialize
from tests.gpu.small import ON_GPU, write_config


@pytest.fixture(scope="session")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small model's `config.json`; this process is a run of its own from here on."""
    initialize(ParallelSection(), seed=0)
    return write_config(tmp_path_factory.mktemp("gpu") / "v3")


@pytest.fixture(autouse=True)
def _empty() -> Iterator[None]:
    """No test finds what another has left in the GPU's memory."""
    yield
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
