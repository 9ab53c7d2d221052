"""A GGUF file as a source: what it says of itself holds, damage is told, memory is bounded."""

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize

from megatron_r1.checkpoint import gguf as ours
from megatron_r1.checkpoint.source import open_source
from megatron_r1.convert.plan import check
from megatron_r1.errors import DataError
from tests.model.dense_models import write_dense
from tests.tools.test_smollm2 import SHAPE, write_gguf

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    return write_gguf(folder / "m.gguf", write_dense(folder / "made", "llama_tied", **SHAPE), Kind.Q4_1)


def test_specs_are_those_of_what_is_read(file: Path) -> None:
    source = open_source(file)
    check(source, any_dtype=False)
    for rule in source.rules:
        for name, tensor in zip(rule.hf, source.read(rule), strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == (source.spec(name).dtype, source.spec(name).shape)
            assert name in source
    assert "lm_head.weight" not in source
    assert "model.layers.0.mlp.experts.weight" not in source
    stored = sum(spec.nbytes for rule in source.rules for spec in source.stored(rule))
    with_padding = file.stat().st_size - gguf.GGUFReader(file).data_offset
    assert with_padding - 32 * 30 < stored <= with_padding
    assert {file.name for file in source.folder.iterdir()} >= {"tokenizer.json", "generation_config.json"}


def test_rows_expanded_piece_by_piece_are_the_same(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(file)
    whole = [source.read(rule) for rule in source.rules]
    monkeypatch.setattr(ours, "_EXPANDED_BYTES", 5 * 4 * SHAPE["hidden_size"])  # five rows, not a divisor of any
    for rule, expected in zip(source.rules, whole, strict=True):
        for tensor, same in zip(source.read(rule), expected, strict=True):
            assert torch.equal(tensor, same)


def test_missing_and_unknown_tensors(tmp_path: Path) -> None:
    model = write_dense(tmp_path / "made", "llama", **SHAPE)
    whole = model.state_dict()
    del whole["model.layers.1.mlp.up_proj.weight"]
    whole["model.layers.0.mlp.gate_proj.bias"] = torch.ones(3)
    model.state_dict = lambda: whole
    source = open_source(write_gguf(tmp_path / "m.gguf", model))
    assert source.unknown() == ["blk.0.ffn_gate.bias"]
    assert "model.layers.1.mlp.up_proj.weight" not in source
    with pytest.raises(DataError, match=r"up_proj|ffn_gate\.bias"):
        check(source, any_dtype=False)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.1, 0.3, 0.6, 0.999])
def test_truncated(file: Path, tmp_path: Path, share: float) -> None:
    content = file.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=r"cut.gguf cannot be read as GGUF"):
        open_source(tmp_path / "cut.gguf")


def test_metadata_that_is_missing(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tensor("output.weight", quantize(np.zeros((2, 32), np.float32), Kind.F32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(DataError, match=r"does not say llama\.attention\.head_count"):
        open_source(tmp_path / "m.gguf")


PEAK = """
import sys
from pathlib import Path
from megatron_r1.checkpoint.source import open_source

def held(key):
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(key)))

source = open_source(Path(sys.argv[1]))
rule = source.rules[0]
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = held("VmRSS")
tensor, = source.read(rule)
print(held("VmHWM") - before, tensor.nbytes // 1024)
"""


def test_memory_is_bounded(tmp_path: Path) -> None:
    """An embedding of 192 MiB, 384 MiB in the float32 that it is expanded to: itself and some scratch."""
    rows, hidden = 2**20, SHAPE["hidden_size"]
    model = write_dense(tmp_path / "made", "llama_tied", **SHAPE)
    weights = {**model.state_dict(), "model.embed_tokens.weight": torch.zeros(1, 1).expand(rows, hidden)}
    model.state_dict = lambda: weights
    path = write_gguf(tmp_path / "m.gguf", model, Kind.F16)
    done = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, cwd=ROOT, check=True)
    peak, kept = map(int, done.stdout.split()[-2:])
    assert kept == rows * hidden * 2 // 1024
    assert kept <= peak < kept + 160 * 1024
