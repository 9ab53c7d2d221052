"""Planned bytes against those of real modules, rank by rank, and against sums worked by hand."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_r1.config.sections import ModelSection, ParallelSection
from megatron_r1.model.memory import Shape
from megatron_r1.plan.state import Copies, Position, Precision, State, States, position
from megatron_r1.plan.tensors import count
from tests.model.conftest import MODEL
from tests.model.test_flops import config_of

V3 = Path(__file__).parents[2] / "examples/deepseek_v3/model"
REPORT = {"pipeline": 16, "pipeline_layout": "Et*4|(t*4|)*14tmL", "expert": 64}
"""DeepSeek-V3's own, with one stage after another."""
BRIDGE = {
    "tensor": 2,
    "pipeline": 8,
    "virtual_pipeline": 4,
    "pipeline_layout": "Et|(tt|)*30mL",
    "expert": 64,
}
"""That of NVIDIA's recipe for 1,024 H100."""


def shape_of(hf: dict[str, Any], **model: Any) -> Shape:
    return Shape.of(hf, ModelSection(path=Path(), **model))


def states_of(folder: Path, parallel: dict[str, Any], gpus: int, **model: Any) -> States:
    hf = json.loads((folder / "config.json").read_text())
    whole = model.get("dtype") == "float32"
    precision = Precision(weight=4, master=0) if whole else Precision()
    return States(shape_of(hf, **model), ParallelSection(**parallel), gpus, precision)


def real_states(cases: list[Any]) -> list[list[dict[str, int]]]:
    command = [sys.executable, "-m", "tests.plan.proof_program", json.dumps(cases)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    found: list[list[dict[str, int]]] = json.loads(done.stdout)
    return found


def compare(chosen: list[tuple[Path, str, dict[str, Any], int]]) -> None:
    """Every distinct rank of every layout of a model in a precision."""
    planned = [
        list(states_of(folder, parallel, gpus, dtype=dtype).distinct()) for folder, dtype, parallel, gpus in chosen
    ]
    cases = [
        [{"path": str(folder), "dtype": dtype}, parallel, gpus, [rank for rank, _, _ in rows]]
        for (folder, dtype, parallel, gpus), rows in zip(chosen, planned, strict=True)
    ]
    for case, rows, found in zip(chosen, planned, real_states(cases), strict=True):
        assert sum(ranks for _, ranks, _ in rows) == case[-1]
        for (rank, _, state), real in zip(rows, found, strict=True):
            assert {name: getattr(state, name) for name in real} == real, (case, rank)


LAYOUTS: dict[str, list[tuple[dict[str, Any], int]]] = {
    "moonlight": [({}, 1), ({"expert": 2}, 4), ({"tensor": 2, "expert": 2, "expert_tensor": 2}, 8)],
    "qwen2": [({}, 3), ({"tensor": 3}, 6)],
    "qwen3": [({"pipeline": 2}, 10), ({"tensor": 3}, 3)],
    "llama_tied": [({}, 5), ({"pipeline": 2}, 6)],
    "qwen3_moe_some_dense": [({"expert": 4}, 8)],
    "mixtral": [({"expert": 2, "context": 2}, 12)],
}
WITH_MTP: list[tuple[dict[str, Any], int]] = [
    ({"tensor": 2, "expert": 2, "expert_tensor": 2}, 4),
    ({"pipeline": 3}, 3),
    ({"pipeline": 2, "pipeline_layout": "Et|ttmL"}, 4),
    ({"pipeline": 2, "virtual_pipeline": 2, "pipeline_layout": "E|t|tt|mL"}, 6),
]


def test_small_models_of_every_family(tmp_path: Path) -> None:
    chosen = [(MODEL, "bfloat16", parallel, gpus) for parallel, gpus in WITH_MTP]
    for name, layouts in LAYOUTS.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config_of(name)))
        chosen += [(folder, dtype, *layout) for dtype in ("float32", "bfloat16") for layout in layouts]
    compare(chosen)


def test_deepseek_v3_at_its_true_size() -> None:
    compare([(V3, "bfloat16", REPORT, 2048), (V3, "bfloat16", BRIDGE, 1024)])


def test_ranks_that_hold_less_of_the_optimizer_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of("qwen2")))
    rows = list(states_of(tmp_path, {}, 7).distinct())
    assert len(rows) > 1
    assert sum(ranks * state.optimizer for _, ranks, state in rows) == 12 * rows[0][2].parameters


def test_the_main_model_counts_what_its_checkpoint_does() -> None:
    counts = count(shape_of(json.loads((V3 / "config.json").read_text())))
    assert counts.main == 671_026_419_200
    assert counts.mtp + 256 == 11_610_068_224  # that report counts the selection biases of the MTP layer, too


def test_positions_are_megatrons() -> None:
    """1,024 ranks, 128 of a stage: tensor-parallel ranks are neighbours, and 64 in a row share the experts."""
    own = ParallelSection(**BRIDGE)
    assert position(own, 1024, 0) == Position(0, 0, 0)
    assert position(own, 1024, 127) == Position(0, 63, 1)
    assert position(own, 1024, 128 + 65) == Position(1, 32, 1)
    assert Copies.of(own, 1024) == Copies(64, 2)


def test_states_add() -> None:
    assert State(1, 2, 3, 4, 5) + State(1, 1, 1, 1) == State(2, 3, 4, 5, 5)
