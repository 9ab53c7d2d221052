"""Weights for engines that every rank writes its share of are those of the model, whatever its layout.

A vLLM engine that takes such a folder is in tests/end_to_end/test_rl_layouts.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_r1.config.convert import CastConfig
from megatron_r1.convert.verbs import run_cast
from tests.convert.invented import same, tensors
from tests.distributed.layouts import LAYOUTS, ROUTER_BIAS, Launcher, Seen, parts

COPIES = {"embed_tokens": "model.embed_tokens.weight", "head": "lm_head.weight"}
"""What an MTP layer shares with the model, and a folder does not hold twice."""
UNCUT = ["dp2", "pp2", "ep2"]
CUT = ["tp2", "tp2_dp2", "tp2_ep2"]
"""Layouts with parts of tensors, in tensor-parallel groups of two ranks that follow one another."""
STAGED = ["pp2"]
"""Layouts whose stages are not equally large, and hold nothing in common."""
NO_MTP = {"section": {"mtp_loss_coef": 0.0}}

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def casts(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The model in bfloat16 and in FP8."""
    plain, quantised = (tmp_path_factory.mktemp("casts") / name for name in ("bfloat16", "fp8"))
    run_cast(CastConfig(source=launcher.folder / "models/v3", output=plain))
    run_cast(CastConfig(source=plain, output=quantised, dtype="fp8"))
    return plain, quantised


def run(launcher: Launcher, kind: str, name: str, layout: str, to: Path, **changes: Any) -> Seen:
    return launcher.run(f"{kind}_{name}", LAYOUTS[layout], parts(kind, to=str(to), **changes))[kind]


@pytest.mark.parametrize("layout", [*UNCUT, *CUT])
def test_every_rank_writes_of_what_it_holds(launcher: Launcher, layout: str, tmp_path: Path) -> None:
    """Each tensor once, as Hugging Face's folder has it. A part travels to nobody but its writer, from its peer."""
    found = run(launcher, "pushed", layout, layout, tmp_path / "sync")
    source = {
        name: tensor if name.endswith(ROUTER_BIAS) else tensor.bfloat16()
        for name, tensor in load_file(launcher.folder / "models/v3/model.safetensors").items()
    }
    copies = {name: source[COPIES[name.split(".")[-2]]] for name in found.weights.keys() - source.keys()}
    assert len(copies) == 2
    assert same(found.weights, source | copies)
    files, ranks, names = (found.seen[key] for key in ("files", "ranks", "names"))
    assert sum(map(len, files.values())) == len(found.weights)
    assert found.seen["agreeing"] == [True, True]
    assert set(found.seen["few"]) == set(found.seen["tried"]) != set()
    assert found.seen["plan"].startswith(f"weights reach the engines by disk from {len(ranks)} ranks: ")
    assert sorted(files) == [f"rank-{number:05d}" for number in range(len(ranks))], "every rank has written"
    for number, rank in enumerate(ranks):
        written = {names[name] for name in files[f"rank-{number:05d}"]}
        assert written <= rank["held"].keys()
        lacking = sum(found.seen["wholes"][name] - rank["held"][name] for name in written)
        assert sum(size for _, size in rank["messages"]) == lacking * torch.bfloat16.itemsize
        assert (lacking > 0) == (layout in CUT)
        assert {sender for sender, _ in rank["messages"]} <= {number ^ 1}
    if layout not in STAGED:
        sizes = [sum(found.weights[name].nbytes for name in each) for each in files.values()]
        assert max(sizes) - min(sizes) <= 2 * max(tensor.nbytes for tensor in found.weights.values())


@pytest.mark.parametrize("layout", ["tp2", "ep2"])
def test_in_fp8(launcher: Launcher, casts: tuple[Path, Path], layout: str, tmp_path: Path) -> None:
    """Byte for byte what `cast` writes, also of the layers that are not trained, which the first rank has."""
    plain, quantised = (str(folder) for folder in casts)
    found = run(launcher, "pushed", f"{layout}_fp8", layout, tmp_path / "sync", model=plain, fp8=quantised, **NO_MTP)
    stored = tensors(casts[1])
    assert same(found.weights, stored)
    assert found.seen["bytes"] == sum(tensor.nbytes for tensor in stored.values())
    kinds = [{found.weights[name].dtype for name in names} for names in found.seen["files"].values()]
    assert all(torch.float8_e4m3fn in kind for kind in kinds), "each rank has quantised"


def test_a_rank_that_fails(launcher: Launcher, casts: tuple[Path, Path], tmp_path: Path) -> None:
    """All say the same, nothing half-written stays, and the next push is whole."""
    plain, quantised = (str(folder) for folder in casts)
    name = "decoder.layers.1.self_attention.linear_proj.weight"
    found = run(
        launcher, "broken_push", "tp2", "tp2", tmp_path / "sync", model=plain, fp8=quantised, nan=name, **NO_MTP
    )
    assert found.seen["1"] == {"said": ["", ""], "left": ["weights-1"]}
    full, broken = found.seen["2"], found.seen["3"]
    assert full["said"][0] == full["said"][1]
    assert full["said"][0].startswith("EngineError: cannot write the weights for the engines on rank 1: ")
    assert "File too large" in full["said"][0]
    assert broken["said"][0] == broken["said"][1]
    assert broken["said"][0].startswith("DataError: model.layers.1.self_attn.o_proj.weight holds NaN")
    assert full["left"] == broken["left"] == ["weights-1"]
    assert found.seen["4"] == {"said": ["", ""], "left": ["weights-4"]}
    assert same(found.weights, tensors(casts[1]))
