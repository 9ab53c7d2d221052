"""Directories of distributed checkpoints, read and written without a process group; what is damaged or hostile."""

import io
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    Metadata,
    TensorStorageMetadata,
)

from megatron_r1.checkpoint.store import Checkpoints
from megatron_r1.checkpoint.torch_dist import (
    PartWriter,
    Record,
    TorchDistReader,
    finish,
    is_torch_dist,
    item_nbytes,
    saved_nbytes,
)
from megatron_r1.checkpoint.torch_dist_index import record
from megatron_r1.compat.checkpoint_pickles import read_metadata
from megatron_r1.compat.megatron_checkpoint import SaveStrategy
from megatron_r1.compat.megatron_specs import name_in_rules
from megatron_r1.config.sections import ModelSection, ParallelSection
from megatron_r1.errors import DataError
from megatron_r1.model.build import build_model
from megatron_r1.model.hf_folder import read_config
from megatron_r1.model.mapping import weights
from megatron_r1.model.parallel import initialize
from megatron_r1.model.safetensors_file import Spec
from megatron_r1.model.sharding import Piece, layout
from megatron_r1.train.policy import Policy
from tests.checkpoint.conftest import MODEL

EMBEDDING = "embedding.word_embeddings.weight"
WHOLE = torch.arange(2 * 12 * 6).view(2, 12, 6).to(torch.bfloat16)


def piece(*box: tuple[int, int], key: str = EMBEDDING, whole: torch.Tensor = WHOLE) -> Piece:
    """The rectangle from a to b on each axis."""
    return Piece(key, tuple(whole.shape), tuple(a for a, _ in box), tuple(b - a for a, b in box))


def cut(box: Piece, whole: torch.Tensor = WHOLE) -> torch.Tensor:
    return whole[tuple(slice(a, a + n) for a, n in zip(box.offset, box.shape, strict=True))]


def written(folder: Path, *pieces: Piece, whole: torch.Tensor = WHOLE) -> Path:
    """A checkpoint of one tensor in these chunks."""
    folder.mkdir()
    writer = PartWriter(folder / "__0_0.distcp")
    for box in pieces:
        writer.put(box, cut(box, whole))
    finish(folder, writer.close(), (), {})
    return folder


GRIDS = {
    "whole": [piece((0, 2), (0, 12), (0, 6))],
    "layers": [piece((i, i + 1), (0, 12), (0, 6)) for i in range(2)],
    "columns": [piece((0, 2), (0, 12), (i, i + 2)) for i in (4, 0, 2)],
    "uneven": [
        piece((0, 1), (0, 5), (0, 6)),
        piece((0, 1), (5, 12), (0, 4)),
        piece((0, 1), (5, 12), (4, 6)),
        piece((1, 2), (0, 12), (0, 6)),
    ],
}
WANTED = [
    piece((0, 2), (0, 12), (0, 6)),
    piece((1, 2), (0, 12), (0, 6)),
    piece((0, 1), (6, 12), (0, 6)),
    piece((0, 2), (3, 7), (1, 5)),
    piece((1, 2), (11, 12), (5, 6)),
]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("wanted", WANTED, ids=range(len(WANTED)))
def test_any_rectangle_comes_out_of_any_chunks(grid: str, wanted: Piece, tmp_path: Path) -> None:
    reader = TorchDistReader(written(tmp_path / "saved", *GRIDS[grid]))
    assert dict(reader.keys) == {EMBEDDING: Spec(torch.bfloat16, (2, 12, 6))}
    found = reader.read(wanted)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, cut(wanted))
    assert reader.stored_bytes(wanted) == found.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_dtypes_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    whole = WHOLE.to(dtype)
    found = TorchDistReader(written(tmp_path / "saved", *GRIDS["layers"], whole=whole)).read(WANTED[0])
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), whole.view(torch.uint8))


def test_sizes_are_known_before_writing_and_views_do_not_drag_their_storage_along(tmp_path: Path) -> None:
    writer, expected = PartWriter(tmp_path / "part.distcp"), 0
    large = torch.randn(700, 300)
    for view in (large[3:5], large[:, :7], large.t(), large[0, 0], large.bfloat16()[:600, 100:]):
        box = Piece("k", tuple(view.shape), (0,) * view.dim(), tuple(view.shape))
        writer.put(box, view)
        size = saved_nbytes(Spec(view.dtype, tuple(view.shape)))
        assert view.nbytes + 300 < size <= item_nbytes(view.nbytes)
        expected += size
    records = writer.close()
    assert (tmp_path / "part.distcp").stat().st_size == expected == sum(record["length"] for record in records)


def test_a_part_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    writer = PartWriter(tmp_path / "part.distcp")
    writer.put(WANTED[0], WHOLE)
    assert [path.name for path in tmp_path.iterdir()] == ["part.distcp.partial"]
    writer.abandon()
    assert list(tmp_path.iterdir()) == []
    writer = PartWriter(tmp_path / "part.distcp")
    writer.close()
    writer.abandon()
    assert [path.name for path in tmp_path.iterdir()] == ["part.distcp"]


@pytest.mark.parametrize("size", [10, 10_000_000], ids=["while closing", "while writing"])
def test_a_full_disk_is_told_as_such(size: int, tmp_path: Path) -> None:
    (tmp_path / "part.distcp.partial").symlink_to("/dev/full")
    writer = PartWriter(tmp_path / "part.distcp")

    def write() -> None:
        writer.put(Piece("k", (size,), (0,), (size,)), torch.zeros(size))
        writer.close()

    with pytest.raises(OSError, match="No space left on device"):
        write()
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


def bytes_read() -> int:
    """By this process so far."""
    return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])


def test_of_a_chunk_that_is_much_larger_only_a_part_is_read(tmp_path: Path) -> None:
    whole = torch.randn(1, 64, 32768)
    wanted = piece((0, 1), (17, 19), (5, 32768), whole=whole)
    reader = TorchDistReader(written(tmp_path / "saved", piece((0, 1), (0, 64), (0, 32768), whole=whole), whole=whole))
    before = bytes_read()
    found = reader.read(wanted)
    assert bytes_read() - before < whole.nbytes / 8
    assert torch.equal(found, cut(wanted, whole))


def test_a_chunk_saved_in_another_order_of_its_numbers(tmp_path: Path) -> None:
    """`torch.save` keeps strides."""
    turned = WHOLE[0].t().contiguous().t()
    assert not turned.is_contiguous()
    buffer = io.BytesIO()
    torch.save(turned, buffer)
    (tmp_path / "part.distcp").write_bytes(buffer.getvalue())
    box = Piece(EMBEDDING, (12, 6), (0, 0), (12, 6))
    finish(tmp_path, [record(box, turned.dtype, "part.distcp", 0, len(buffer.getvalue()))], (), {})
    reader = TorchDistReader(tmp_path)
    assert torch.equal(reader.read(box), WHOLE[0])
    assert torch.equal(reader.read(Piece(EMBEDDING, (12, 6), (4, 0), (1, 6))), WHOLE[0, 4:5])


def test_it_is_what_megatron_writes_for_the_same_model(tmp_path: Path) -> None:
    initialize(ParallelSection(), seed=0)
    module = build_model(ModelSection(path=MODEL, load_weights=False, dtype="float32", init_std=0.1), 64).module
    places, tensors = layout(read_config(MODEL)), named(module)
    writer = PartWriter(tmp_path / "__0_0.distcp")
    for name, place in places.places.items():
        for box, block in zip(place.pieces, tensors[name].chunk(len(place.pieces)), strict=True):
            writer.put(box, block)
    records: list[Record] = json.loads(json.dumps(writer.close()))
    finish(tmp_path, records, places.objects, {"iteration": 7})
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    state = module.sharded_state_dict(prefix="", metadata={})
    dist_checkpointing.save({"model": state, "iteration": 7}, str(theirs), SaveStrategy())

    found, expected = read_metadata(tmp_path / ".metadata"), read_metadata(theirs / ".metadata")
    assert outline(found) == outline(expected)
    assert found.storage_data.keys() == expected.storage_data.keys()
    assert found.version == expected.version
    ours, upstream = ((folder / "metadata.json").read_text() for folder in (tmp_path, theirs))
    assert json.loads(upstream).items() <= json.loads(ours).items()  # 0.16 says also how common.pt is read
    assert torch.load(tmp_path / "common.pt") == torch.load(theirs / "common.pt") == {"iteration": 7}
    reader = TorchDistReader(theirs)
    assert all(torch.equal(reader.read(box), TorchDistReader(tmp_path).read(box)) for box in boxes(places))


def named(model: GPTModel) -> dict[str, torch.Tensor]:
    """Weights by the names that rules know, whatever the version of megatron-core."""
    return {name_in_rules(name): tensor for name, tensor in weights(model).items()}


def boxes(places: Any) -> list[Piece]:
    return [box for place in places.places.values() for box in place.pieces]


def outline(metadata: Metadata) -> dict[str, Any]:
    """What a checkpoint holds, whatever order it was written in."""
    return {
        key: (entry.properties, entry.size, sorted((tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks))
        if isinstance(entry, TensorStorageMetadata)
        else "object"
        for key, entry in metadata.state_dict_metadata.items()
    }


def test_the_model_of_a_training_checkpoint(trained: tuple[Checkpoints, Policy, Path]) -> None:
    _, policy, folder = trained
    reader, places = TorchDistReader(folder), layout(policy.model.hf).places
    assert reader.keys.keys() == {box.key for place in places.values() for box in place.pieces}
    tensors = named(policy.model.module)
    for name, place in places.items():
        found = torch.cat([reader.read(box).reshape(-1, *place.shape[1:]) for box in place.pieces])
        assert torch.equal(found, tensors[name]), name


def repointed(folder: Path, choose: Callable[[Any], bool], content: bytes) -> None:
    """Let the first entry that is chosen stand in a file of its own, with this content."""
    metadata = read_metadata(folder / ".metadata")
    key = next(key for key, entry in metadata.state_dict_metadata.items() if choose(entry))
    index = next(index for index in metadata.storage_data if index.fqn == key)
    (folder / "own.distcp").write_bytes(content)
    metadata.storage_data[index] = _StorageInfo("own.distcp", 0, len(content))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / ".metadata").unlink(), r"cannot read .*\.metadata: No such file"),
        (lambda folder: (folder / ".metadata").write_bytes(b""), r"\.metadata: .*damaged"),
        (lambda folder: (folder / ".metadata").write_bytes(pickle.dumps({"a": 1})), r"\.metadata: .*holds a dict"),
        (lambda folder: (folder / "metadata.json").unlink(), r"is not a torch_dist checkpoint"),
        (lambda folder: (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}'), r"is not a torch_dist"),
        (lambda folder: (folder / "__0_0.distcp").unlink(), r"incomplete: __0_0\.distcp is missing"),
        (lambda folder: os.truncate(folder / "__0_0.distcp", 300), r"__0_0\.distcp is damaged where embedding"),
        (lambda folder: (folder / "__0_0.distcp").write_bytes(b"x" * 5000), r"__0_0\.distcp.* (where|for) embedd"),
        (
            lambda folder: repointed(folder, lambda _: True, saved(torch.zeros(2, 12, 6))),
            r"own\.distcp is damaged where .*: it is torch\.float32 \[2, 12, 6\], not torch\.bfloat16",
        ),
        (lambda folder: repointed(folder, lambda _: True, saved([1])), r"own\.distcp is damaged .*: it is a list"),
    ],
    ids=["no index", "empty index", "other pickle", "no mark", "other format", "no part", "truncated", "garbage",
         "other dtype", "no tensor"],
)  # fmt: skip
def test_damage_is_named(harm: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "saved", *GRIDS["whole"])
    assert is_torch_dist(folder)
    harm(folder)
    with pytest.raises(DataError, match=message):
        TorchDistReader(folder).read(WANTED[0])


def test_a_file_outside_the_checkpoint_is_not_read(tmp_path: Path) -> None:
    folder = written(tmp_path / "saved", *GRIDS["whole"])
    metadata = read_metadata(folder / ".metadata")
    next(iter(metadata.storage_data.values())).relative_path = "../other"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(DataError, match=r"names a file outside the checkpoint: \.\./other"):
        TorchDistReader(folder)


def test_what_was_not_saved_is_missed(tmp_path: Path) -> None:
    folder = written(tmp_path / "saved", *GRIDS["uneven"])
    reader = TorchDistReader(folder)
    with pytest.raises(DataError, match=r"saved has no decoder\.x"):
        reader.read(Piece("decoder.x", (1,), (0,), (1,)))
    with pytest.raises(DataError, match=r"has shape \[2, 12, 6\], but config\.json makes it \[2, 12, 7\]"):
        reader.read(Piece(EMBEDDING, (2, 12, 7), (0, 0, 0), (2, 12, 7)))
    metadata = read_metadata(folder / ".metadata")
    entry = metadata.state_dict_metadata[EMBEDDING]
    assert isinstance(entry, TensorStorageMetadata)
    del entry.chunks[1]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(DataError, match=rf"{EMBEDDING} was saved in part only"):
        TorchDistReader(folder).read(WANTED[0])
    assert torch.equal(TorchDistReader(folder).read(WANTED[1]), cut(WANTED[1]))


def test_a_checkpoint_without_a_language_model(tmp_path: Path) -> None:
    writer = PartWriter(tmp_path / "part.distcp")
    writer.put(Piece("vision.weight", (2, 12, 6), (0, 0, 0), (2, 12, 6)), WHOLE)
    finish(tmp_path, writer.close(), (), {})
    with pytest.raises(DataError, match=r"holds no language model"):
        TorchDistReader(tmp_path)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (GRIDS["uneven"][:-1], r"do not make up its shape \[2, 12, 6\]"),
        (GRIDS["uneven"] + GRIDS["uneven"][:1], r"do not make up its shape"),
        (GRIDS["layers"] + [piece((0, 1), (0, 1), (0, 1))], r"do not make up its shape"),
        ([piece((0, 2), (0, 12), (0, 6)), Piece(EMBEDDING, (2, 12, 7), (0, 0, 6), (2, 12, 1))], r"disagree"),
        ([Piece(EMBEDDING, (2, 12, 6), (0, 0, 1), (2, 12, 6))], r"do not make up its shape"),
    ],
    ids=["gap", "twice", "overlap", "two shapes", "outside"],
)
def test_pieces_that_do_not_make_a_whole_are_no_checkpoint(pieces: list[Piece], message: str, tmp_path: Path) -> None:
    writer = PartWriter(tmp_path / "part.distcp")
    for box in pieces:
        writer.put(box, torch.zeros(box.shape))
    with pytest.raises(DataError, match=message):
        finish(tmp_path, writer.close(), (), {})
    assert not is_torch_dist(tmp_path)
