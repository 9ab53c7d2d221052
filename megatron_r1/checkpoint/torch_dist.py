"""Megatron's `torch_dist` checkpoint directory, read and written piece by piece without a process group.

The directory holds `.distcp` files of PyTorch's distributed checkpoint, their index `.metadata`, `common.pt`, and
`metadata.json`, which says that it is whole.
"""

import contextlib
import io
import json
import math
import os
import pickle
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_r1.checkpoint.torch_dist_chunks import Box, Chunk, ChunkReader, frame, saved_nbytes
from megatron_r1.checkpoint.torch_dist_index import Record, index, record
from megatron_r1.compat.checkpoint_pickles import read_metadata
from megatron_r1.data.files import aside, write_json
from megatron_r1.errors import DataError
from megatron_r1.model.safetensors_file import Spec
from megatron_r1.model.sharding import Piece

__all__ = [
    "EMBEDDING",
    "PartWriter",
    "Record",
    "TorchDistReader",
    "finish",
    "is_torch_dist",
    "item_nbytes",
    "saved_nbytes",
]

_CONFIG, _INDEX, _COMMON, _OBJECTS = "metadata.json", ".metadata", "common.pt", "objects.distcp"
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_CONTAINER_BYTES = 2048
"""More than what stands around the numbers of an item."""
EMBEDDING = "embedding.word_embeddings.weight"
_VOCABULARY = (EMBEDDING, "output_layer.weight")
_PADDING = range(128, 128 * 64 + 1, 128)
"""What the rows of a vocabulary are rounded up to a multiple of by Megatron-LM: 128 x its tensor parallel size."""
_PREFIXES = ("", "model.", "module.")
"""Before a model's keys: in Megatron-LM's checkpoints, those of our training runs, NeMo's."""
_ADAPTERS = ".lora."
"""Within the names of adapters' weights (`model/lora.py`)."""
_NOT_THE_MODEL = re.compile(r"(chained_\d+\.)?optimizer\.|rng_state|rerun_state_machine")


def is_torch_dist(folder: Path) -> bool:
    """Whether a folder is a distributed checkpoint of Megatron's, in this format."""
    try:
        config = json.loads((folder / _CONFIG).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("sharded_backend") == "torch_dist"


class TorchDistReader:
    """The model's tensors in a directory that megatron-core or `PartWriter` wrote, whatever chunks they are cut into.

    Of a training checkpoint only the model is seen: the prefix of its keys is taken off, optimizer state is left out,
    and so are the rows by which Megatron-LM pads a vocabulary. `common.pt`, a pickle, is not opened.
    Nothing is read before it is asked for. Thread-safe.

    Args:
        folder: holds `.metadata` and `metadata.json`.

    Raises:
        DataError: not such a directory, damaged, a file missing, or a pickle in it names a foreign class.
    """

    keys: Mapping[str, Spec]
    """Key -> dtype and global shape."""
    style: Mapping[str, bool]
    """Under which of Megatron's switches it was saved; what `sharding.layout` takes."""

    def __init__(self, folder: Path) -> None:
        if not is_torch_dist(folder):
            raise DataError(f"{folder} is not a torch_dist checkpoint of Megatron's: it has no such {_CONFIG}")
        self.folder, self._numbers = folder, ChunkReader()
        try:
            self._open()
        except OSError as error:
            raise DataError(f"cannot read {folder / _INDEX}: {error.strerror}") from error
        except DataError:
            raise
        except (pickle.UnpicklingError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{folder / _INDEX}: {error}") from error
        for path in sorted({chunk.file for chunks in self._chunks.values() for chunk in chunks.values()}):
            if not path.is_file():
                raise DataError(f"{folder} is incomplete: {path.name} is missing")
        self.style = {
            "non_homogeneous_layers": any(re.match(r"decoder\.layers\.\d", key) for key in self.keys),
            "singleton_local_shards": any(key.endswith("linear_fc1.weight_w") for key in self.keys),
        }

    def _open(self) -> None:
        metadata = read_metadata(self.folder / _INDEX)
        tensors = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
        prefix = self._prefix(tensors)
        keys, chunks = {}, {}
        for name, tensor in tensors.items():
            if not name.startswith(prefix) or (not prefix and _NOT_THE_MODEL.match(name)):
                continue
            key = name.removeprefix(prefix)
            keys[key] = Spec(tensor.properties.dtype, tuple(tensor.size))
            chunks[key] = self._chunks_of(name, key, tensor, metadata.storage_data)
        self.keys, self._chunks = keys, chunks

    def _prefix(self, names: Collection[str]) -> str:
        found = next((prefix for prefix in _PREFIXES if prefix + EMBEDDING in names), None)
        if found is None:
            if any(_ADAPTERS in name for name in names):
                raise DataError(
                    f"{self.folder} holds LoRA adapters only: the weights that they belong to stay in the folder that "
                    "the run began with. The run merges the two when it ends, into the folder hf of its output: run "
                    "the same command again to let it end, and take that folder"
                )
            raise DataError(f"{self.folder} holds no language model: it has no {EMBEDDING}")
        return found

    def _chunks_of(
        self, name: str, key: str, tensor: TensorStorageMetadata, stored: Mapping[MetadataIndex, Any]
    ) -> dict[tuple[int, ...], Chunk]:
        chunks = {}
        for chunk in tensor.chunks:
            where = stored[MetadataIndex(name, chunk.offsets)]
            if Path(where.relative_path).name != where.relative_path:
                raise DataError(f"{self.folder / _INDEX} names a file outside the checkpoint: {where.relative_path}")
            offset, path = tuple(chunk.offsets), self.folder / where.relative_path
            chunks[offset] = Chunk(
                key, offset, tuple(chunk.sizes), tensor.properties.dtype, path, where.offset, where.length
            )
        return chunks

    def read(self, piece: Piece, among: Sequence[Chunk] | None = None) -> torch.Tensor:
        """One rectangle. [piece.shape]

        Args:
            piece: the rectangle.
            among: what `holding` says of a larger one; None = it is asked.

        Raises:
            DataError: no such key, other global shape, rectangle not covered by what was saved, damaged file.
        """
        wanted = Box.of(piece)
        boxes = [(chunk, wanted.common(Box.of(chunk))) for chunk in among or self.holding(piece)]
        parts = [(chunk, box) for chunk, box in boxes if box]
        if sum(box.volume for _, box in parts) != wanted.volume:
            raise DataError(f"{self.folder}: {piece.key} was saved in part only, or twice")
        if len(parts) == 1:
            return self._numbers.read(*parts[0])
        out = torch.empty(piece.shape, dtype=self.spec(piece).dtype)
        for chunk, box in parts:
            out[box.within(piece.offset)] = self._numbers.read(chunk, box)
        return out

    def holding(self, piece: Piece) -> list[Chunk]:
        """The chunks that hold something of a rectangle. A key of all layers and experts has ten thousands of chunks.

        Raises:
            DataError: no such key, other global shape.
        """
        self.spec(piece)
        chunks, wanted = self._chunks[piece.key], Box.of(piece)
        whole = chunks.get(piece.offset)
        if whole is not None and whole.shape == piece.shape:
            return [whole]
        return [chunk for chunk in chunks.values() if wanted.common(Box.of(chunk))]

    def stored_bytes(self, piece: Piece) -> int:
        """Bytes of the rectangle's numbers as stored.

        Raises:
            DataError: no such key, other global shape.
        """
        return self.spec(piece).dtype.itemsize * math.prod(piece.shape)

    def spec(self, piece: Piece) -> Spec:
        """Dtype and global shape of the tensor that a rectangle is of, padding included.

        Raises:
            DataError: no such key, other global shape.
        """
        if piece.key not in self.keys:
            raise DataError(f"{self.folder} has no {piece.key}")
        spec = self.keys[piece.key]
        if spec.shape != piece.global_shape and not _is_padded(piece, spec.shape):
            hint = "; vocab_size must be the number of its rows" if piece.key in _VOCABULARY else ""
            raise DataError(
                f"{self.folder}: {piece.key} has shape {list(spec.shape)}, but config.json makes it "
                f"{list(piece.global_shape)}{hint}"
            )
        return spec


class PartWriter:
    """One `.distcp` file, written item after item: aside (`<name>.partial`), flushed to disk and renamed by `close`.

    Records name the file by its own name alone: the directory may be renamed. Not thread-safe; one thread a part.
    In this process `torch.save` leaves out its checksums from here on: no reader of PyTorch's looks at them, and they
    cost as much as the writing.
    """

    def __init__(self, path: Path) -> None:
        torch.serialization.set_crc32_options(False)
        self.path = path
        self._aside = path.with_name(path.name + ".partial")
        self._file = self._aside.open("wb")
        self._records: list[Record] = []

    def put(self, piece: Piece, tensor: torch.Tensor) -> None:
        """Append one piece; its numbers are not copied where `tensor` is contiguous.

        Args:
            piece: where it stands.
            tensor: as many elements as the piece, in the dtype that is to be stored.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        self.put_rows(piece, tensor.dtype, [tensor])

    def put_rows(self, piece: Piece, dtype: torch.dtype, blocks: Iterable[torch.Tensor]) -> None:
        """Append one piece that comes in consecutive blocks of its numbers; otherwise as `put`.

        Raises:
            ValueError: the blocks do not make up the piece.
            OSError: as `put`.
        """
        spec, start = Spec(dtype, piece.shape), self._file.tell()
        before, behind = frame(spec)
        self._file.write(before)
        for block in blocks:
            if block.dtype != dtype:
                raise ValueError(f"{piece.key}: {block.dtype} among {dtype}")
            self._file.write(block.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        self._file.write(behind)
        length = self._file.tell() - start
        if length != saved_nbytes(spec):
            raise ValueError(f"{piece.key}: {length} bytes instead of {saved_nbytes(spec)}")
        self._records.append(record(piece, dtype, self.path.name, start, length))

    def close(self) -> list[Record]:
        """Finish the file; one record for each piece put."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._aside, self.path)
        return self._records

    def abandon(self) -> None:
        """Close and remove the file that stands aside, after an error; does nothing after `close`."""
        with contextlib.suppress(OSError):  # closing writes what is left, and the disk may be full
            self._file.close()
        self._aside.unlink(missing_ok=True)


def item_nbytes(nbytes: int) -> int:
    """Bytes that `PartWriter.put` writes for a piece of `nbytes`, at most; `saved_nbytes` knows it to the byte."""
    return nbytes + _CONTAINER_BYTES


def finish(folder: Path, records: Iterable[Record], objects: Iterable[str], common: Mapping[str, Any]) -> None:
    """Make the parts in `folder` a checkpoint: objects, `common.pt`, `.metadata`, and last `metadata.json`.

    Args:
        folder: holds the parts.
        records: of all of them.
        objects: `Layout.objects`.
        common: plain values of `common.pt` (numbers, text, lists, dictionaries).

    Raises:
        DataError: pieces of a key overlap, leave a gap, or disagree about shape or dtype.
    """
    empty = _saved([None])
    files = {
        _OBJECTS: empty,
        _COMMON: _saved(dict(common)),
        _INDEX: pickle.dumps(index(records, objects, (_OBJECTS, len(empty)))),
    }
    for name, content in files.items():
        with aside(folder / name) as path, path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    write_json(folder / _CONFIG, _FORMAT)


def _is_padded(piece: Piece, shape: tuple[int, ...]) -> bool:
    """Whether all that a stored vocabulary has more than the model's is padding behind it."""
    rows, due = shape[0], piece.global_shape[0]
    rounded = any(rows % multiple == 0 and rows - multiple < due < rows for multiple in _PADDING)
    return piece.key in _VOCABULARY and shape[1:] == piece.global_shape[1:] and rounded


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
