"""`tools/bench/h100.py` from end to end on a CPU, with a miniature; its slice's size by arithmetic."""

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_r1.config.sections import ParallelSection
from megatron_r1.model.hf_folder import read_config
from megatron_r1.model.parallel import initialize
from tests.rollout.tiny_model import free_port

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "tools/bench"


def run(output: Path, *options: str) -> tuple[dict[str, Any], str]:
    command = [sys.executable, str(BENCH / "h100.py"), "--tiny", f"--output={output}", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text()), done.stdout


def test_learners(tmp_path: Path) -> None:
    figures, shown = run(tmp_path / "h100.json", "--parts", "learners")
    rows = [(row["name"], row["baseline_name"]) for row in figures["results"]]
    assert rows == [
        ("training, BF16", "Megatron-core"),
        ("training, BF16", "transformers"),
        ("log-probabilities, BF16", "transformers"),
    ]
    for row in figures["results"]:
        assert row["rounds"] == 2
        assert row["share"] == pytest.approx(row["tflops"] / figures["peaks"]["bf16"])
    training, _, scoring = figures["results"]
    # A forward pass is a third of a step.
    per_token = [row["tflops"] / row["ours"] for row in (training, scoring)]
    assert per_token[0] == pytest.approx(3 * per_token[1])
    assert figures["peaks"]["fp8"] is None
    assert "log-probabilities, BF16" in shown


@pytest.mark.parametrize("numbers", ["bf16", "fp8"])
def test_the_baseline_is_computed_with_the_same_kernels(numbers: str) -> None:
    """Megatron-core's own layer spec under the very config that ours has: else no ratio would mean anything."""
    command = [sys.executable, "-m", "tests.tools.published_program", numbers]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    ours, published = found["ours"], found["published"]
    assert published == ours
    chosen = {
        name: published["config"][name] for name in ("moe_grouped_gemm", "moe_permute_fusion", "transformer_impl")
    }
    assert chosen == {
        "moe_grouped_gemm": "True",
        "moe_permute_fusion": "True",
        "transformer_impl": "'transformer_engine'",
    }
    assert published["config"]["fp8"] == {"bf16": "None", "fp8": "'e4m3'"}[numbers]
    assert published["modules"]["TEGroupedMLP"] == published["modules"]["MoELayer"] > 0


def test_engines(tmp_path: Path) -> None:
    figures, shown = run(tmp_path / "h100.json", "--parts", "engines", f"--port={free_port()}")
    push, rollout = figures["results"]
    assert (push["unit"], rollout["unit"]) == ("GB/s", "tokens/s")
    assert push["baseline"] == figures["peaks"]["to_host"]
    assert min(push["ours_figures"] + rollout["ours_figures"]) > 0
    assert "LLM.generate" in shown


@pytest.mark.parametrize("kind", ["Ours", "Megatron", "Transformers"])
def test_a_learner_leaves_no_memory_behind(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has the whole device: two of them would not fit."""
    monkeypatch.syspath_prepend(BENCH)
    import h100_learners
    import h100_slice

    initialize(ParallelSection(), seed=0)
    folder = h100_slice.write(tmp_path / "slice", tiny=True)
    stage, rows = h100_learners.Stage(1, 128), h100_learners.batch(400, 2, 64)
    before = tensor_bytes()
    stage.speed(kind, lambda: getattr(h100_learners, kind)(folder, rows), "step")()
    held = tensor_bytes() - before
    stage.clear()
    assert held > 1e6
    assert tensor_bytes() - before < held / 20


def tensor_bytes() -> int:
    """Of all tensors of this process, memory that several have counted once."""
    gc.collect()
    # By the class alone: asking other objects what they are makes some of them import what they stand for.
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())


def test_slice_has_true_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    import h100_slice

    hf, whole = read_config(h100_slice.write(tmp_path / "slice", tiny=False, experts=16)), read_config(h100_slice.V3)
    changed = {name for name in whole if hf[name] != whole[name]}
    assert changed == {
        "num_hidden_layers", "first_k_dense_replace", "num_nextn_predict_layers", "vocab_size", "n_routed_experts"
    }  # fmt: skip
    # Of 80 GB: a dense layer of 583M, two of 187M and 44M an expert, the shared one included, and both embeddings,
    # at 18 bytes a parameter.
    experts = h100_slice.most_experts(hf, 80 * 10**9)
    states = 18 * (583e6 + 2 * (187e6 + 44e6 * (experts + 1)) + 2 * 8192 * 7168)
    assert 0.5 * 80e9 < states < h100_slice.USED * 80e9
    with pytest.raises(SystemExit, match="10 GiB of free memory do not hold a slice"):
        h100_slice.most_experts(hf, 10 * 2**30)
