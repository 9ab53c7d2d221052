"""What the pickled index of a distributed checkpoint may hold, and what it may not do."""

import pickle
import re
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_r1.checkpoint.torch_dist import TorchDistReader
from megatron_r1.compat.checkpoint_pickles import read_metadata
from megatron_r1.errors import DataError
from tests.checkpoint.test_torch_dist import GRIDS, WANTED, WHOLE, written


def as_pickled(module: str, name: str) -> bytes:
    """The instructions that put a class upon the stack."""
    return b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)) + b"\x93"


@pytest.mark.parametrize(
    ("module", "name"),
    [("os", "system"), ("builtins", "eval"), ("torch", "load"), ("torch.distributed.checkpoint.metadata", "os.system"),
     ("torch.distributed.checkpoint.metadata", "Metadata.__init__"), ("torch.serialization", "load")],
)  # fmt: skip
def test_only_plain_records_may_stand_in_the_index(module: str, name: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "saved", *GRIDS["whole"])
    (folder / ".metadata").write_bytes(b"\x80\x04" + as_pickled(module, name) + b".")
    with pytest.raises(DataError, match=rf"\.metadata: refuses to load {re.escape(module)}\.{re.escape(name)}"):
        TorchDistReader(folder)


@pytest.mark.parametrize("change", [b"N}\x8c\x05extraK\x05s\x86b", b"N}\x8c\x07__doc__K\x05s\x86b"], ids=["new", "old"])
def test_the_index_cannot_change_the_classes_that_it_names(change: bytes, tmp_path: Path) -> None:
    folder, before = written(tmp_path / "saved", *GRIDS["whole"]), dict(vars(Metadata))
    pickled = b"\x80\x04" + as_pickled(Metadata.__module__, "Metadata") + change + b"."
    pickle.loads(pickled)
    assert vars(Metadata) != before  # the payload works
    for name in vars(Metadata).keys() - before.keys():
        delattr(Metadata, name)
    Metadata.__doc__ = before["__doc__"]
    (folder / ".metadata").write_bytes(pickled)
    with pytest.raises(DataError, match=r"refuses to change .*Metadata"):
        TorchDistReader(folder)
    assert vars(Metadata) == before


def test_an_index_of_python_3_13(tmp_path: Path) -> None:
    """Which says that paths are of `pathlib._local`."""
    folder = written(tmp_path / "saved", *GRIDS["whole"])
    metadata = read_metadata(folder / ".metadata")
    assert metadata.storage_meta
    metadata.storage_meta.checkpoint_id = Path("/of/the/writer")
    pickled = pickle.dumps(metadata)
    older, newer = (b"\x8c" + bytes([len(name)]) + name for name in (b"pathlib", b"pathlib._local"))
    assert pickled.count(older) == 1
    frame = len(pickled) - 11 + len(newer) - len(older)
    pickled = pickled[:3] + frame.to_bytes(8, "little") + pickled[11:].replace(older, newer)
    (folder / ".metadata").write_bytes(pickled)
    assert torch.equal(TorchDistReader(folder).read(WANTED[0]), WHOLE)
