"""What we write, megatron-core loads under any parallel layout; what it saves under any of them, we read."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_r1.checkpoint.torch_dist import PartWriter, TorchDistReader, finish
from megatron_r1.compat.megatron_specs import name_in_rules
from megatron_r1.config.sections import ModelSection, ParallelSection
from megatron_r1.model.build import build_model
from megatron_r1.model.mapping import weights
from megatron_r1.model.parallel import initialize
from megatron_r1.model.sharding import Layout, layout
from tests.checkpoint.layout_program import DONE
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


CASES: dict[str, tuple[str, list[tuple[int, dict[str, int]]], dict[str, bool]]] = {
    "deepseek": ("deepseek", MOE, {}),
    "qwen3": ("qwen3", DENSE, {}),
    "llama_tied": ("llama_tied", DENSE[1:], {}),
    "qwen3_moe": ("qwen3_moe", [(2, {"tp": 2, "ep": 2}), (4, {"pp": 2, "ep": 2})], {}),
    "qwen3_by_layer": ("qwen3", DENSE[:1], {"non_homogeneous_layers": True}),
    "deepseek_by_expert": ("deepseek", MOE[2:3], {"singleton_local_shards": True}),
}
"""Model, layouts (processes, sizes), switches of Megatron's."""


def prepare(folder: Path, name: str, style: dict[str, bool]) -> None:
    """Write config.json, all tensors as `reference.pt`, and our own checkpoint of them as `ours`."""
    folder.mkdir()
    hf = config_of(name)
    (folder / "config.json").write_text(json.dumps(hf))
    section = ModelSection(path=folder, load_weights=False, dtype="float32", init_std=0.1, mtp_loss_coef=0.1)
    shapes = {name_in_rules(name): tensor for name, tensor in weights(build_model(section, 64).module).items()}
    tensors = {name: torch.randn_like(tensor) for name, tensor in shapes.items() if name in layout(hf).places}
    if hf.get("tie_word_embeddings"):
        tensors["output_layer.weight"] = tensors["embedding.word_embeddings.weight"]
    torch.save(tensors, folder / "reference.pt")
    save(folder / "ours", layout(hf, style), tensors)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the program has loaded ours and saved its own for every layout of every case."""
    root, jobs = tmp_path_factory.mktemp("layouts"), []
    initialize(ParallelSection(), seed=0)
    for case, (name, layouts, style) in CASES.items():
        folder = root / case
        prepare(folder, name, style)
        for number, (processes, parallel) in enumerate(layouts):
            (folder / f"theirs_{number}").mkdir()
            job = {"processes": processes, "layout": parallel, "style": style, "config": str(folder)}
            files = {"reference": "reference.pt", "checkpoint": "ours", "output": f"theirs_{number}"}
            jobs.append(job | {key: str(folder / file) for key, file in files.items()})
    (root / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "tests.checkpoint.layout_program", str(root / "jobs.json")]
    subprocess.run(command, cwd=ROOT, check=True)
    return root


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("case", "number"),
    [(case, number) for case, (_, layouts, _) in CASES.items() for number in range(len(layouts))],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_any_layout(done: Path, case: str, number: int) -> None:
    theirs, hf = done / case / f"theirs_{number}", config_of(CASES[case][0])
    assert (theirs / DONE).exists(), f"{CASES[case][1][number]}: see the program's errors"
    found, tensors = read(theirs, hf), torch.load(done / case / "reference.pt", weights_only=True)
    assert found.keys() == layout(hf).places.keys()
    assert {key for key in found if not torch.equal(found[key], tensors[key])} == set()
