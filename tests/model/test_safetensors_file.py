"""One safetensors file against the format's own library, and every way in which a file can be wrong."""

import errno
import json
import os
import resource
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_r1.errors import DataError
from megatron_r1.model.safetensors_file import DTYPES, Spec, Writer, read, read_header

LIBRARY = [dtype for dtype in DTYPES.values() if dtype is not torch.float8_e8m0fnu]  # it has no name for that one
SHAPES = [(), (0,), (1,), (3, 5), (2, 0, 4), (2, 3, 4)]


def random(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if dtype is torch.bool:
        return torch.rand(shape) > 0.5
    return torch.randint(0, 100, (*shape, dtype.itemsize), dtype=torch.uint8).view(dtype).view(shape)


def equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    same = (first.dtype, first.shape) == (second.dtype, second.shape)
    return same and torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


def specs(tensors: dict[str, torch.Tensor]) -> dict[str, Spec]:
    return {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with Writer(path, specs(tensors)) as file:
        for name in reversed(tensors):
            file.put(name, tensors[name])


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {f"{dtype}{shape}": random(dtype, shape) for dtype in LIBRARY for shape in SHAPES}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt", "ünï": "cöde"})
    entries = read_header(tmp_path / "a.safetensors")
    assert entries.keys() == tensors.keys()
    assert all(equal(read(entries[name]), tensors[name]) for name in tensors)


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    """Odd lengths of one-byte numbers come first in `specs`, and yet all others are aligned."""
    tensors = {f"{dtype}{shape}": random(dtype, shape) for dtype in reversed(LIBRARY) for shape in SHAPES}
    save(tmp_path / "a.safetensors", tensors)
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(equal(loaded[name], tensors[name]) for name in tensors)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file without it
    for entry in read_header(tmp_path / "a.safetensors").values():
        assert entry.offset % entry.dtype.itemsize == 0


def test_every_dtype_comes_back(tmp_path: Path) -> None:
    tensors = {f"{dtype}{shape}": random(dtype, shape) for dtype in DTYPES.values() for shape in SHAPES}
    save(tmp_path / "a", tensors)
    entries = read_header(tmp_path / "a")
    assert all(equal(read(entries[name]), tensors[name]) for name in tensors)
    assert {name: Spec(entry.dtype, entry.shape) for name, entry in entries.items()} == specs(tensors)


def test_tensors_stand_in_the_order_of_their_specs(tmp_path: Path) -> None:
    names = ["model.layers.10.b", "model.layers.2.b", "a"]
    save(tmp_path / "a", {name: torch.zeros(2) for name in names})
    assert list(read_header(tmp_path / "a")) == names


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(12.0, requires_grad=True).view(3, 4)
    save(tmp_path / "a.safetensors", {"turned": base.t(), "part": base[1:, ::2]})
    loaded = load_file(tmp_path / "a.safetensors")
    assert torch.equal(loaded["turned"], base.t())
    assert torch.equal(loaded["part"], base[1:, ::2])


def test_empty_file(tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors", {})
    assert read_header(tmp_path / "a.safetensors") == load_file(tmp_path / "a.safetensors") == {}


def test_threads_write_one_file(tmp_path: Path) -> None:
    tensors = {str(number): torch.full((1000,), number) for number in range(64)}
    with Writer(tmp_path / "a", specs(tensors)) as file:
        groups = [[(name, tensors[name]) for name in list(tensors)[start::4]] for start in range(4)]
        threads = [threading.Thread(target=lambda group=group: [file.put(*item) for item in group]) for group in groups]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    entries = read_header(tmp_path / "a")
    assert all(equal(read(entries[name]), tensors[name]) for name in tensors)


def raw(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def item(begin: int, end: int, shape: Any = (1,), dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}


TWICE = (
    b'{"w.a": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}, "w.a": {"dtype":"U8","shape":[1],"data_offsets":[1,2]}}'
)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (TWICE, b"ab", "names w.a twice"),
        ({"a": item(0, 1), "b": item(0, 1)}, b"a", "b overlaps"),
        ({"a": item(0, 1), "b": item(2, 3)}, b"abc", "b leaves a gap"),
        ({"a": item(1, 2)}, b"ab", "a leaves a gap"),
        ({"a": item(0, 1)}, b"ab", "1 bytes behind"),
        ({"a": item(0, 9, (9,))}, b"abc", "truncated: 6 of its"),
        ({"a": item(0, 2)}, b"ab", r"a U8 \[1\] takes 1 bytes, but has 2"),
        ({"a": item(0, 2, (2,), "BF16")}, b"ab", "takes 4 bytes"),
        ({"a": item(2, 1)}, b"ab", "takes 1 bytes, but has -1"),
        ({"a": item(0, 1, dtype="F4")}, b"a", "a has dtype 'F4'"),
        ({"a": item(0, 1, dtype=["U8"])}, b"a", "dtype"),
        ({"a": item(0, 1, (-1,))}, b"a", "not a whole number"),
        ({"a": item(0, 1, (True,))}, b"a", "not a whole number"),
        ({"a": item(0, 1, 7)}, b"a", "lacks dtype, shape or data_offsets"),
        ({"a": {"dtype": "U8", "shape": [1]}}, b"a", "lacks dtype, shape or data_offsets"),
        ({"a": 1}, b"", "lacks dtype, shape or data_offsets"),
        (b"{nothing}", b"", "not JSON"),
        (b'{"\xff": 1}', b"", "not JSON"),
        (b'{"a": ' + b"[" * 100_000, b"", "not JSON"),
        (json.dumps({"a": item(0, 0, (0,))}).encode("utf-16-le"), b"", "not JSON in UTF-8"),
        (rb'{"\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}', b"", "not JSON in UTF-8"),
        ({"a": item(0, 0, (0, 2**63))}, b"", "a has a size that no tensor has"),
        ({"a": item(0, 0, (2**40, 2**40, 0))}, b"", "a has a size that no tensor has"),
        ({"a": item(0, 0, (2**61, 0), "F64")}, b"", "a has a size that no tensor has"),
        ({"a": item(0, 1, (1,) * 65)}, b"a", "a has a size that no tensor has"),
        (b"[]", b"", "does not begin with a header"),
    ],
)
def test_header_that_contradicts_itself(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    path = raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(DataError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kept", [0, 7, 8, 20])
def test_file_that_ends_in_its_header(tmp_path: Path, kept: int) -> None:
    save(tmp_path / "a", {"x": torch.zeros(3)})
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:kept])
    with pytest.raises(DataError, match=r"is not a safetensors file|is truncated"):
        read_header(tmp_path / "a")


def test_file_of_another_kind(tmp_path: Path) -> None:
    """A Git LFS pointer, a pickle."""
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1234\n")
    torch.save({"a": torch.zeros(3)}, tmp_path / "pickle")
    for name in ("pointer", "pickle"):
        with pytest.raises(DataError, match="is not a safetensors file"):
            read_header(tmp_path / name)


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_header(tmp_path / "nowhere")
    with pytest.raises(DataError, match="Is a directory"):
        read_header(tmp_path)


def test_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    save(tmp_path / "a", {"x": torch.zeros(3), "y": torch.zeros(3)})
    entries = read_header(tmp_path / "a")
    os.truncate(tmp_path / "a", entries["y"].offset + 4)
    assert torch.equal(read(entries["x"]), torch.zeros(3))
    with pytest.raises(DataError, match=r"a is truncated: it ends within y"):
        read(entries["y"])
    (tmp_path / "a").unlink()
    with pytest.raises(DataError, match="cannot read x from"):
        read(entries["x"])


@settings(max_examples=200, deadline=None)
@given(cut=st.integers(0, 300), flip=st.integers(0, 2400))
def test_no_damage_gets_through_or_surprises(tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int) -> None:
    """Whatever is cut off or flipped in the header: an error of ours, or the names and sizes that are there."""
    path = tmp_path_factory.mktemp("damaged") / "a"
    save(path, {"x": torch.zeros(3), "y": torch.zeros(2, 2, dtype=torch.bfloat16)})
    content = bytearray(path.read_bytes())
    content[flip // 8 % len(content)] ^= 1 << flip % 8
    path.write_bytes(content[: len(content) - cut] if cut < len(content) else b"")
    try:
        entries = read_header(path)
    except DataError:
        return
    assert cut == 0
    for entry in entries.values():
        assert read(entry).nbytes == entry.nbytes


def test_writer_refuses_what_its_header_does_not_say(tmp_path: Path) -> None:
    with Writer(tmp_path / "a", {"x": Spec(torch.bfloat16, (2, 3))}) as file:
        with pytest.raises(DataError, match="no place for a tensor y"):
            file.put("y", torch.zeros(2, 3))
        with pytest.raises(DataError, match=r"x is torch.float32 \[2, 3\].*torch.bfloat16 \[2, 3\]"):
            file.put("x", torch.zeros(2, 3))
        with pytest.raises(DataError, match=r"\[3, 2\]"):
            file.put("x", torch.zeros(3, 2, dtype=torch.bfloat16))
        file.put("x", torch.zeros(2, 3, dtype=torch.bfloat16))
        with pytest.raises(DataError, match="x was given twice"):
            file.put("x", torch.zeros(2, 3, dtype=torch.bfloat16))


def test_rows_are_written_and_read_as_the_whole_is(tmp_path: Path) -> None:
    tensors = {"x": torch.randn(7, 3, 2), "y": torch.randn(4).bfloat16()}
    save(tmp_path / "whole", tensors)
    with Writer(tmp_path / "rows", specs(tensors)) as file:
        for x, y in zip(tensors["x"].split(2), tensors["y"].split(1), strict=True):
            file.put_rows("x", x)
            file.put_rows("y", y)
        with pytest.raises(DataError, match="y was given twice"):
            file.put_rows("y", tensors["y"][:1])
    assert (tmp_path / "rows").read_bytes() == (tmp_path / "whole").read_bytes()
    entry = read_header(tmp_path / "rows")["x"]
    assert torch.equal(read(entry.rows(2, 5)), tensors["x"][2:5])
    assert entry.rows(0, 7) == entry


def test_rows_that_do_not_make_up_the_tensor(tmp_path: Path) -> None:
    wanted = {"x": Spec(torch.float32, (3, 2))}
    file = Writer(tmp_path / "a", wanted)
    file.put_rows("x", torch.zeros(2, 2))
    for rows, message in [
        (torch.zeros(2, 2), "x was given twice"),
        (torch.zeros(1, 3), r"x is torch.float32 \[1, 3\].*torch.float32 \[3, 2\]"),
        (torch.zeros(1, 2).half(), r"x is torch.float16"),
    ]:
        with pytest.raises(DataError, match=message):
            file.put_rows("x", rows)
    with pytest.raises(DataError, match="lacks 1 of its tensors, for example x"):
        file.close()


def test_unfinished_file_is_no_file(tmp_path: Path) -> None:
    wanted = {"x": Spec(torch.bfloat16, (2,)), "y": Spec(torch.bfloat16, (2,))}
    with (
        pytest.raises(DataError, match=r"lacks 1 of its tensors, for example y"),
        Writer(tmp_path / "a", wanted) as file,
    ):
        file.put("x", torch.zeros(2, dtype=torch.bfloat16))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError), Writer(tmp_path / "a", wanted) as file:
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_disk_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="No such file or directory"):
        Writer(tmp_path / "nowhere" / "a", {})
    file = Writer(tmp_path / "a", {"x": Spec(torch.float32, (2,))})

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DataError, match=r"cannot write .*a: No space left on device"):
        file.put("x", torch.zeros(2))
    with pytest.raises(DataError, match="lacks 1 of its tensors"):
        file.close()
    monkeypatch.undo()
    closes = os.close
    file = Writer(tmp_path / "a", {})
    monkeypatch.setattr(os, "close", lambda descriptor: (closes(descriptor), full()))
    with pytest.raises(OSError, match="No space left"):  # told by a file system in the network
        file.abort()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", full)  # where a delayed allocation finds the disk full
    with pytest.raises(DataError, match="No space left on device"):
        save(tmp_path / "a", {"x": torch.zeros(2)})
    assert not (tmp_path / "a").exists()


def test_file_larger_than_allowed_leaves_nothing(tmp_path: Path) -> None:
    """A true refusal of the system, in `Writer` itself."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(DataError, match="File too large"):
            Writer(tmp_path / "a", {"x": Spec(torch.float32, (1000,))})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
