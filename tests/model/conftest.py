"""A tiny DeepSeek-V3 with random weights, exported to a Hugging Face folder."""

import json
from pathlib import Path

import pytest
import torch

from megatron_r1.config.sections import ModelSection, ParallelSection
from megatron_r1.model import hf_folder
from megatron_r1.model.build import BuiltModel, build_model
from megatron_r1.model.parallel import initialize

MODEL = Path(__file__).parents[2] / "examples/r1_tiny/model"


def section(path: Path = MODEL, **changes: object) -> ModelSection:
    """[model] of the tiny model at random, in float32, with larger weights than in training so that errors show."""
    values = {"load_weights": False, "dtype": "float32", "init_std": 0.08, "mtp_loss_coef": 0.3} | changes
    return ModelSection(path=path, **values)


@pytest.fixture(scope="session")
def built() -> BuiltModel:
    """The tiny model with a selection bias that matters."""
    initialize(ParallelSection(), seed=0)
    model = build_model(section(balance_loss_coef=0.0), max_sequence_length=128)
    for name, buffer in model.module.named_buffers():
        if name.endswith("expert_bias"):
            buffer.copy_(0.1 * torch.randn_like(buffer))
    return model


@pytest.fixture(scope="session")
def exported(built: BuiltModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its Hugging Face folder."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    hf_folder.write(folder, built.hf, built.export(torch.float32), MODEL)
    return folder


@pytest.fixture
def model_folder(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Writes a model folder whose config.json differs from the tiny model's in the given keys (None = removed)."""

    def write(**changes: object) -> Path:
        config = json.loads((MODEL / "config.json").read_text()) | changes
        config = {key: value for key, value in config.items() if value is not None}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write
