"""Checkpoints are read without running what a pickle in them says.

PyTorch's distributed checkpoints describe themselves in a pickle, `.metadata`, and hold small objects as pickles.
Upstream loads both with the plain unpickler (torch 2.13: distributed/checkpoint/filesystem.py:930 and
default_planner.py:390), which runs any code that the file names. Can go when upstream uses `weights_only` there.
"""

import contextlib
import io
import pickle
from collections.abc import Iterator
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

ALLOWED = frozenset(
    {
        *(("torch.distributed.checkpoint.metadata", name) for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )),
        *(("torch.distributed.checkpoint.planner", name) for name in (
            "BytesIOWriteData",
            "SavePlan",
            "TensorWriteData",
            "WriteItem",
            "WriteItemType",
        )),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
        ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        ("pathlib", "PosixPath"),
        *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    }
)  # fmt: skip
"""(module, name) of what `.metadata` may hold: plain records of PyTorch's and megatron-core's, and dtypes."""


_MOVED = {"pathlib._local": "pathlib"}
"""Where Python 3.13 says that a class is -> where others have it."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = _MOVED.get(module, module)
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"refuses to load {module}.{name}, which has no business in a checkpoint")
        found = super().find_class(module, name)
        return partial(found) if name == "_get_layout" else found  # a function keeps what a pickle sets on it


@contextlib.contextmanager
def _classes_untouched() -> Iterator[None]:
    """A pickle can set attributes of a class that it names as of an object: that is undone and refused."""
    named = (getattr(import_module(module), name, None) for module, name in ALLOWED)
    before = {found: dict(vars(found)) for found in named if isinstance(found, type)}
    try:
        yield
    finally:
        changed = [found for found, attributes in before.items() if vars(found) != attributes]
        for found in changed:
            for name in vars(found).keys() - before[found].keys():
                delattr(found, name)
            for name, value in before[found].items():
                if vars(found)[name] is not value:
                    setattr(found, name, value)
    if changed:
        raise pickle.UnpicklingError(f"refuses to change {changed[0].__module__}.{changed[0].__qualname__}")


def read_metadata(path: Path) -> Metadata:
    """A checkpoint's `.metadata`.

    Raises:
        OSError: it cannot be read.
        pickle.UnpicklingError: it is not a pickle, names something that is not allowed, or is of something else.
    """
    content = path.read_bytes()
    try:
        with _classes_untouched():
            metadata = _Unpickler(io.BytesIO(content)).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise pickle.UnpicklingError(f"{path.name} is damaged ({type(error).__name__}: {error})") from error
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"{path.name} holds a {type(metadata).__name__}, not a checkpoint's metadata")
    return metadata


class _Reader(FileSystemReader):
    """Reads `.metadata` once, by `read_metadata`, and objects as weights are read: plain values and tensors."""

    @cached_property
    def _metadata(self) -> Metadata:
        metadata = read_metadata(Path(self.path) / ".metadata")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self._metadata

    def read_data(self, plan: Any, planner: Any) -> Any:
        vars(planner)["load_bytes"] = partial(_load_plain, planner)
        return super().read_data(plan, planner)


def _load_plain(planner: Any, item: Any, value: io.BytesIO) -> None:
    """`DefaultLoadPlanner.load_bytes`, but for the unpickler."""
    name, plain = item.dest_index.fqn, torch.load(value, weights_only=True)
    if planner.flatten_state_dict:
        set_element(planner.original_state_dict, planner.mappings[name], plain)
    else:  # as megatron-core 0.19 asks for
        planner.state_dict[name] = plain


def refuse_foreign_pickles() -> None:
    """Make megatron-core's `dist_checkpointing` read through the class above, whatever planner it has."""
    vars(torch_strategy).update(
        _get_filesystem_reader=lambda checkpoint_dir, *_, **__: _Reader(checkpoint_dir), FileSystemReader=_Reader
    )
