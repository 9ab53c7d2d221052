"""What we write, megatron-core loads under any parallel layout; what it saves under any of them, we read."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_r1.checkpoint.torch_dist import PartWriter, TorchDistReader, finish
from megatron_r1.config.sections import ModelSection, ParallelSection
from megatron_r1.model.build import build_model
from megatron_r1.model.mapping import weights
from megatron_r1.model.parallel import initialize
from megatron_r1.model.sharding import Layout, layout
from tests.model.dense_models import MODELS, SHAPE
from tests.model.moe_models import MOE_MODELS

ROOT = Path(__file__).parents[2]
MOE: list[tuple[int, dict[str, int]]] = [
    (2, {"tp": 2}),
    (2, {"tp": 2, "etp": 2}),
    (2, {"tp": 2, "ep": 2}),
    (2, {"ep": 2}),
    (2, {"pp": 2}),
    (2, {"pp": 2, "vpp": 2}),
    (4, {"tp": 2, "pp": 2}),
]
DENSE: list[tuple[int, dict[str, int]]] = [(2, {"tp": 2}), (2, {"pp": 2}), (4, {"tp": 2, "pp": 2, "vpp": 2})]
SHAPES = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}


def config_of(name: str) -> dict[str, Any]:
    """A model's config.json, four layers deep."""
    if name == "deepseek":
        hf = json.loads((ROOT / "examples/r1_tiny/model/config.json").read_text())
        return hf | {"num_hidden_layers": 4}
    config, model_class, own = (MODELS | MOE_MODELS)[name]
    return {**config(**{**SHAPE, **own, **SHAPES}).to_dict(), "architectures": [model_class.__name__]}


def save(folder: Path, places: Layout, tensors: dict[str, torch.Tensor]) -> None:
    """Our own checkpoint, in two parts."""
    folder.mkdir()
    names = list(places.places)
    records = []
    for part, share in enumerate((names[::2], names[1::2])):
        writer = PartWriter(folder / f"__{part}_0.distcp")
        for name in share:
            pieces = places.places[name].pieces
            for piece, block in zip(pieces, tensors[name].chunk(len(pieces)), strict=True):
                writer.put(piece, block)
        records += writer.close()
    finish(folder, json.loads(json.dumps(records)), places.objects, {"iteration": 0})


def read(folder: Path, hf: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A whole checkpoint."""
    reader = TorchDistReader(folder)
    places = layout(hf, reader.style).places
    return {
        name: torch.cat([reader.read(piece).reshape(-1, *place.shape[1:]) for piece in place.pieces])
        for name, place in places.items()
    }


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "layouts", "style"),
    [
        ("deepseek", MOE, {}),
        ("qwen3", DENSE, {}),
        ("llama_tied", DENSE[1:], {}),
        ("qwen3_moe", [(2, {"tp": 2, "ep": 2}), (4, {"pp": 2, "ep": 2})], {}),
        ("qwen3", DENSE[:1], {"non_homogeneous_layers": True}),
        ("deepseek", MOE[2:3], {"singleton_local_shards": True}),
    ],
    ids=["deepseek", "qwen3", "llama_tied", "qwen3_moe", "qwen3_by_layer", "deepseek_by_expert"],
)
def test_any_layout(
    name: str, layouts: list[tuple[int, dict[str, int]]], style: dict[str, bool], tmp_path: Path
) -> None:
    hf = config_of(name)
    (tmp_path / "config.json").write_text(json.dumps(hf))
    initialize(ParallelSection(), seed=0)
    section = ModelSection(path=tmp_path, load_weights=False, dtype="float32", init_std=0.1, mtp_loss_coef=0.1)
    tensors = {key: torch.randn_like(tensor) for key, tensor in weights(build_model(section, 64).module).items()}
    tensors = {key: tensor for key, tensor in tensors.items() if key in layout(hf).places}
    if hf.get("tie_word_embeddings"):
        tensors["output_layer.weight"] = tensors["embedding.word_embeddings.weight"]
    torch.save(tensors, tmp_path / "reference.pt")
    save(tmp_path / "ours", layout(hf, style), tensors)
    jobs = []
    for number, (processes, parallel) in enumerate(layouts):
        (tmp_path / f"theirs_{number}").mkdir()
        jobs.append(
            {
                "config": str(tmp_path),
                "reference": str(tmp_path / "reference.pt"),
                "processes": processes,
                "layout": parallel,
                "style": style,
                "checkpoint": str(tmp_path / "ours"),
                "output": str(tmp_path / f"theirs_{number}"),
            }
        )
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "tests.checkpoint.layout_program", str(tmp_path / "jobs.json")]
    subprocess.run(command, cwd=ROOT, check=True)
    for number in range(len(layouts)):
        found = read(tmp_path / f"theirs_{number}", hf)
        assert {key for key in found if not torch.equal(found[key], tensors[key])} == set()
        assert found.keys() == layout(hf).places.keys()
