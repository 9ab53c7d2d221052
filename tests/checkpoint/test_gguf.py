"""A GGUF file as a source: what it says of itself holds, damage is told, memory is bounded."""

import os
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


@pytest.mark.parametrize(
    ("changed", "value", "message"),
    [
        ("add_tokenizer_pre", "llama-bpe", r"tokenizer\.ggml\.pre is 'llama-bpe'; only 'smollm' or 'gpt-2'"),
        ("add_tokenizer_pre", None, r"tokenizer\.ggml\.pre is None"),
        ("add_rope_scaling_type", gguf.RopeScalingType.YARN, r"llama\.rope\.scaling\.type is 'yarn'"),
        ("add_token_types", None, r"does not say tokenizer\.ggml\.token_type"),
        ("add_token_merges", None, r"does not say tokenizer\.ggml\.merges"),
        ("add_token_merges", ["zz qq"], "contradicts itself"),
        ("add_token_types", [1], "contradicts itself"),
        ("add_bos_token_id", 10**6, "contradicts itself"),
        ("add_head_count", 0, "contradicts itself"),
        ("add_head_count_kv", [3, 3], "contradicts itself"),
    ],
)
def test_metadata_that_is_not_understood(
    changed: str, value: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would otherwise give another model or tokenizer than the file's."""
    true = getattr(gguf.GGUFWriter, changed)
    at = "add_rope_dimension_count" if changed == "add_rope_scaling_type" else changed
    kept = getattr(gguf.GGUFWriter, at)

    def change(writer: gguf.GGUFWriter, given: object) -> None:
        if at != changed:
            kept(writer, given)
        if value is not None:
            true(writer, value)

    monkeypatch.setattr(gguf.GGUFWriter, at, change)
    path = write_gguf(tmp_path / "m.gguf", write_dense(tmp_path / "made", "llama", **SHAPE))
    with pytest.raises(DataError, match=message):
        open_source(path)


def test_a_file_that_changes_after_it_was_opened(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", write_dense(tmp_path / "made", "llama", **SHAPE))
    source = open_source(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(DataError, match=r"m\.gguf is truncated"):
        [source.read(rule) for rule in source.rules]
    path.unlink()
    with pytest.raises(DataError, match=r"cannot read .*m\.gguf: No such file"):
        source.read(source.rules[0])


def test_metadata_that_is_missing(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_tensor("output.weight", quantize(np.zeros((2, 32), np.float32), Kind.F32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(DataError, match=r"does not say llama\.attention\.head_count"):
        open_source(tmp_path / "m.gguf")


def held(key: str) -> int:
    """KiB of this process: VmRSS now, VmHWM at most."""
    return int(next(line.split()[1] for line in Path("/proc/self/status").open() if line.startswith(key)))


def test_memory_is_bounded(tmp_path: Path) -> None:
    """An embedding of 96 MiB, 192 MiB in the float32 that it is expanded to: itself and some scratch."""
    rows, hidden = 2**19, SHAPE["hidden_size"]
    model = write_dense(tmp_path / "made", "llama_tied", **SHAPE)
    weights = {**model.state_dict(), "model.embed_tokens.weight": torch.zeros(1, 1).expand(rows, hidden)}
    model.state_dict = lambda: weights
    path = write_gguf(tmp_path / "m.gguf", model, Kind.F16)
    source = open_source(path)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = held("VmRSS")
    [tensor] = source.read(source.rules[0])
    peak, kept = held("VmHWM") - before, tensor.nbytes // 1024
    assert kept == rows * hidden * 2 // 1024
    assert 0.9 * kept <= peak < kept + 160 * 1024  # other memory may be given back meanwhile
