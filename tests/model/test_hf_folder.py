"""Model folders: what a reader gives and refuses, and that a folder is written whole or not at all."""

import errno
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_r1.errors import DataError
from megatron_r1.model import fp8, hf_folder
from megatron_r1.model.hf_folder import TensorReader
from megatron_r1.model.safetensors_file import Spec
from megatron_r1.model.shards import INDEX

CONFIG = {"architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 300}
WEIGHT, SCALE = "model.layers.0.self_attn.o_proj.weight", "model.layers.0.self_attn.o_proj.weight_scale_inv"
Tensors = dict[str, torch.Tensor]


def stored() -> Tensors:
    """An FP8 weight with begun blocks, its scale, and two tensors that are not quantised."""
    numbers, scale = fp8.quantize(torch.randn(200, 300))
    return {WEIGHT: numbers, SCALE: scale, "model.norm.weight": torch.ones(300).bfloat16(), "bias": torch.rand(4)}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two shards and an index; the scale is in another file than its weight."""
    tensors, folder = stored(), tmp_path / "hf"
    folder.mkdir()
    files = {"model-1.safetensors": [WEIGHT, "bias"], "model-2.safetensors": [SCALE, "model.norm.weight"]}
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def change(folder: Path, file: str, **tensors: torch.Tensor | None) -> None:
    """Write a shard again with other tensors, and the index to fit."""
    values = load_file(folder / file) | {name: tensor for name, tensor in tensors.items() if tensor is not None}
    values = {name: tensor for name, tensor in values.items() if tensors.get(name, tensor) is not None}
    save_file(values, folder / file)
    index = json.loads((folder / INDEX).read_text())
    others = {name: place for name, place in index["weight_map"].items() if place != file}
    (folder / INDEX).write_text(json.dumps(index | {"weight_map": others | dict.fromkeys(values, file)}))


def change_index(folder: Path, **files: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= files
    (folder / INDEX).write_text(json.dumps(index))


def test_reader_shows_weights_and_hides_scales(checkpoint: Path) -> None:
    reader = TensorReader(checkpoint)
    assert sorted(reader) == sorted([WEIGHT, "bias", "model.norm.weight"])
    assert SCALE not in reader
    assert reader.stored.keys() == {WEIGHT, SCALE, "bias", "model.norm.weight"}
    numbers = load_file(checkpoint / "model-1.safetensors")
    scale = load_file(checkpoint / "model-2.safetensors")[SCALE]
    assert torch.equal(reader[WEIGHT], fp8.dequantize(numbers[WEIGHT], scale))
    assert torch.equal(reader["bias"], numbers["bias"])
    with pytest.raises(KeyError):
        reader[SCALE]


def test_specs_say_what_the_tensors_are(checkpoint: Path) -> None:
    reader = TensorReader(checkpoint)
    for name in reader:
        value = reader[name]
        assert reader.spec(name) == Spec(value.dtype, tuple(value.shape))
    assert reader.spec(WEIGHT).nbytes == 200 * 300 * 2


def test_block_size_is_that_of_the_config(checkpoint: Path) -> None:
    numbers, scale = fp8.quantize(torch.randn(200, 300), (64, 100))
    change(checkpoint, "model-1.safetensors", **{WEIGHT: numbers})
    change(checkpoint, "model-2.safetensors", **{SCALE: scale})
    with pytest.raises(DataError, match=r"has shape \[4, 3\].*in blocks of \[128, 128\] needs \[2, 3\]"):
        TensorReader(checkpoint)
    config = CONFIG | {"quantization_config": {"weight_block_size": [64, 100]}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert torch.equal(TensorReader(checkpoint)[WEIGHT], fp8.dequantize(numbers, scale, block=(64, 100)))


def test_folder_without_an_index(tmp_path: Path) -> None:
    tensors = stored()
    save_file({SCALE: tensors.pop(SCALE)}, tmp_path / "b.safetensors")
    save_file(tensors, tmp_path / "a.safetensors")
    assert sorted(TensorReader(tmp_path)) == sorted(tensors)
    save_file({"bias": tensors["bias"]}, tmp_path / "c.safetensors")
    with pytest.raises(DataError, match=r"bias is in both a.safetensors and c.safetensors"):
        TensorReader(tmp_path)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -1.0])
def test_scale_that_is_no_scale(checkpoint: Path, bad: float) -> None:
    scale = load_file(checkpoint / "model-2.safetensors")[SCALE]
    scale[1, 2] = bad
    change(checkpoint, "model-2.safetensors", **{SCALE: scale})
    reader = TensorReader(checkpoint)
    with pytest.raises(DataError, match=rf"model-2.safetensors: {SCALE} holds {bad} at \[1, 2\]"):
        reader[WEIGHT]


@pytest.mark.parametrize(
    ("file", "tensors", "message"),
    [
        (2, {SCALE: None}, f"{WEIGHT} is FP8, but the checkpoint has no {SCALE}"),
        (2, {SCALE: torch.ones(3, 2)}, r"has shape \[3, 2\]"),
        (2, {SCALE: torch.ones(2, 3).half()}, "torch.float16; a scale is float32, bfloat16 or float8_e8m0fnu"),
        (1, {WEIGHT: None}, f"{SCALE} is a scale, but the checkpoint has no {WEIGHT}"),
        (1, {WEIGHT: torch.ones(200, 300)}, f"but {WEIGHT} is torch.float32 and not FP8"),
        (1, {WEIGHT: torch.ones(200, 300).to(torch.float8_e5m2)}, "of the FP8 formats only e4m3 is known"),
        (1, {WEIGHT: torch.ones(4).to(torch.float8_e4m3fn)}, "only matrices"),
    ],
)
def test_weights_and_scales_that_do_not_fit(checkpoint: Path, file: int, tensors: Any, message: str) -> None:
    change(checkpoint, f"model-{file}.safetensors", **tensors)
    with pytest.raises(DataError, match=message):
        TensorReader(checkpoint)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e8m0fnu])
def test_scales_in_fewer_bits_are_read(checkpoint: Path, dtype: torch.dtype) -> None:
    change(checkpoint, "model-2.safetensors", **{SCALE: torch.full((2, 3), 0.5).to(dtype)})
    expected = load_file(checkpoint / "model-1.safetensors")[WEIGHT].bfloat16() / 2
    assert torch.equal(TensorReader(checkpoint)[WEIGHT], expected)


def test_index_names_a_missing_file(checkpoint: Path) -> None:
    (checkpoint / "model-2.safetensors").unlink()
    with pytest.raises(DataError, match=rf"{INDEX} names model-2.safetensors, which is not there \(1 of 2 files"):
        TensorReader(checkpoint)


def test_index_and_files_disagree(checkpoint: Path) -> None:
    change_index(checkpoint, bias="model-2.safetensors")
    with pytest.raises(DataError, match=rf"model-1.safetensors holds bias, which {INDEX} looks for in model-2"):
        TensorReader(checkpoint)
    change_index(checkpoint, bias="model-1.safetensors", more="model-2.safetensors", most="model-2.safetensors")
    with pytest.raises(DataError, match=r"model-2.safetensors has no more, which .* \(2 such tensors\)"):
        TensorReader(checkpoint)


def test_tensor_that_the_index_does_not_name(checkpoint: Path) -> None:
    values = load_file(checkpoint / "model-1.safetensors")
    save_file(values | {"extra": torch.ones(1)}, checkpoint / "model-1.safetensors")
    with pytest.raises(DataError, match=r"holds extra, which .* looks for in no file"):
        TensorReader(checkpoint)
    save_file(values | {SCALE: torch.ones(1)}, checkpoint / "model-1.safetensors")
    with pytest.raises(DataError, match=r"model-1.safetensors holds .*_scale_inv, which .* looks for in model-2"):
        TensorReader(checkpoint)


def test_file_that_the_index_does_not_name(checkpoint: Path) -> None:
    save_file({"x": torch.ones(1)}, checkpoint / "model.safetensors")
    with pytest.raises(DataError, match=r"model.safetensors is not in .*: remove the one that is out of date"):
        TensorReader(checkpoint)
    os.replace(checkpoint / "model.safetensors", checkpoint / "consolidated.safetensors")
    assert "x" not in TensorReader(checkpoint)  # Mistral's copy of the same weights under other names


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe{}", b"{", b"[" * 100_000, b"[]", b'{"architectures": ["X"], "quantization_config": [1]}',
     b'{"architectures": ["X"], "quantization_config": {"weight_block_size": 128}}'],
    ids=range(6),
)  # fmt: skip
def test_config_that_is_none(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "config.json").write_bytes(content)
    with pytest.raises(DataError, match=r"config\.json"):
        TensorReader(checkpoint)


def test_blocks_larger_than_any_weight(checkpoint: Path) -> None:
    """As a hostile config.json has them: they cost no memory."""
    block = {"weight_block_size": [10**12, 10**12]}
    (checkpoint / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": block}))
    change(checkpoint, "model-2.safetensors", **{SCALE: torch.tensor([[0.5]])})
    expected = load_file(checkpoint / "model-1.safetensors")[WEIGHT].bfloat16() / 2
    assert torch.equal(TensorReader(checkpoint)[WEIGHT], expected)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": "../b.safetensors"}}',
        '{"weight_map": {"a": 1}}',
    ],
)
def test_index_that_is_none(checkpoint: Path, text: str) -> None:
    (checkpoint / INDEX).write_text(text)
    with pytest.raises(DataError, match="weight_map"):
        TensorReader(checkpoint)


def test_truncated_shard_is_named(checkpoint: Path) -> None:
    path = checkpoint / "model-1.safetensors"
    os.truncate(path, path.stat().st_size - 5)
    with pytest.raises(DataError, match=r"model-1.safetensors is truncated: 5 of its"):
        TensorReader(checkpoint)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_are_refused_unread(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not even a pickle")
    with pytest.raises(DataError, match=r"only as pickles .* save_pretrained"):
        TensorReader(tmp_path)


def write(folder: Path, tensors: Tensors, **options: Any) -> None:
    hf_folder.write(folder, CONFIG, tensors.items(), **options)


def same(folder: Path, tensors: Tensors) -> bool:
    """By the format's own library."""
    loaded = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    return loaded.keys() == tensors.keys() and all(
        loaded[name].dtype == tensors[name].dtype and torch.equal(loaded[name].float(), tensors[name].float())
        for name in tensors
    )


def test_written_folder_reads_back(tmp_path: Path) -> None:
    tensors = stored()
    write(tmp_path / "out", tensors)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert same(tmp_path / "out", tensors)
    assert hf_folder.read_config(tmp_path / "out") == CONFIG


def test_folder_of_no_tensors(tmp_path: Path) -> None:
    write(tmp_path / "out", {})
    assert list(TensorReader(tmp_path / "out")) == []


def test_shards_are_as_large_as_allowed(tmp_path: Path) -> None:
    """Bytes 400, 400, 4000, 400: a tensor that is larger than a shard gets one of its own."""
    tensors = {name: torch.rand(size) for name, size in {"b": 100, "a": 100, "d": 1000, "c": 100}.items()}
    write(tmp_path / "out", tensors, max_shard_bytes=800)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    first, second, third = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
    assert index == {"metadata": {"total_size": 5200}, "weight_map": {"a": first, "b": first, "c": third, "d": second}}
    assert same(tmp_path / "out", tensors)
    assert sorted(TensorReader(tmp_path / "out")) == sorted(tensors)


def test_one_shard_is_held_at_a_time(tmp_path: Path) -> None:
    """When a tensor is asked for, all that is earlier than the shard before it is on the disk and given back."""
    alive: set[int] = set()

    class Watched(torch.Tensor):
        def __del__(self) -> None:
            alive.discard(id(self))

    def produce():  # type: ignore[no-untyped-def]
        for number in range(12):
            assert len(alive) <= 3
            tensor = torch.zeros(100).as_subclass(Watched)
            alive.add(id(tensor))
            yield str(number), tensor
            del tensor

    hf_folder.write(tmp_path / "out", CONFIG, produce(), max_shard_bytes=800)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 6


def test_views_and_shared_memory_are_written(tmp_path: Path) -> None:
    """Export yields views of the model's own memory, and one tensor under two names."""
    base = torch.nn.Parameter(torch.arange(12.0).view(3, 4))
    write(tmp_path / "out", {"embed": base, "head": base, "part": base[:, 1]})
    assert same(tmp_path / "out", {"embed": base.detach(), "head": base.detach(), "part": base[:, 1].detach()})


def test_companions_come_from_the_first_that_has_them(tmp_path: Path) -> None:
    for folder, names in (("a", ["tokenizer.json"]), ("b", ["tokenizer.json", "merges.txt", "notes.txt"])):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_text(folder)
    hf_folder.write(tmp_path / "out", CONFIG, stored().items(), tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "out/tokenizer.json").read_text() == "a"
    assert (tmp_path / "out/merges.txt").read_text() == "b"
    assert not (tmp_path / "out/notes.txt").exists()


def test_config_says_fp8_only_where_weights_are(tmp_path: Path) -> None:
    """A model read from FP8 and trained is bfloat16: its config.json must not send vLLM looking for scales."""
    config = CONFIG | {"quantization_config": fp8.quantization_config()}
    hf_folder.write(tmp_path / "fp8", config, stored().items())
    assert hf_folder.read_config(tmp_path / "fp8") == config
    hf_folder.write(tmp_path / "bf16", config, [("x", torch.zeros(1))])
    assert hf_folder.read_config(tmp_path / "bf16") == CONFIG


@pytest.fixture
def older(tmp_path: Path) -> Path:
    write(tmp_path / "out", {"old": torch.zeros(3)})
    return tmp_path / "out"


def untouched(folder: Path) -> bool:
    return same(folder, {"old": torch.zeros(3)}) and [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_older_folder_is_replaced_whole(older: Path) -> None:
    (older / "model-00001-of-00002.safetensors").write_text("left over")
    write(older, {"new": torch.ones(3)})
    assert same(older, {"new": torch.ones(3)})
    assert [path.name for path in older.parent.iterdir()] == ["out"]


def test_older_folder_survives_an_error_in_the_tensors(older: Path) -> None:
    def tensors():  # type: ignore[no-untyped-def]
        yield "a", torch.zeros(300)
        yield "b", torch.zeros(300)
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        hf_folder.write(older, CONFIG, tensors(), max_shard_bytes=100)
    assert untouched(older)


def test_two_tensors_of_one_name(older: Path) -> None:
    with pytest.raises(DataError, match="two tensors of the name a"):
        hf_folder.write(older, CONFIG, [("a", torch.zeros(3)), ("b", torch.zeros(3)), ("a", torch.ones(3))])
    assert untouched(older)


@pytest.mark.parametrize("when", ["pwrite", "fsync"])
def test_full_disk_leaves_the_older_folder(older: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    real, calls = getattr(os, when), []

    def full(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(os, when, full)
    tensors = {str(number): torch.zeros(300) for number in range(5)}
    with pytest.raises(DataError, match="No space left on device"):
        write(older, tensors, max_shard_bytes=100)
    assert untouched(older)


def test_full_disk_at_the_small_files(older: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DataError, match=r"cannot write .*out: No space left on device"):
        write(older, {"new": torch.ones(3)})
    assert untouched(older)


def test_failed_rename_brings_the_older_folder_back(older: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if source.name.endswith(".partial"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(DataError, match="Input/output error"):
        write(older, {"new": torch.ones(3)})
    assert untouched(older)


def test_run_killed_between_the_renames(older: Path) -> None:
    """The next one finds the older folder under its other name, and must not lose it if it fails itself."""
    os.replace(older, older.with_name("out.old"))
    with pytest.raises(DataError, match="two tensors"):
        hf_folder.write(older, CONFIG, [("a", torch.zeros(3)), ("a", torch.ones(3))])
    assert untouched(older)
    shutil.copytree(older, older.with_name("out.old"))  # killed after them, before the last removal
    write(older, {"new": torch.ones(3)})
    assert same(older, {"new": torch.ones(3)})
    assert [path.name for path in older.parent.iterdir()] == ["out"]


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*file/out: Not a directory"):
        write(tmp_path / "file" / "out", stored())
