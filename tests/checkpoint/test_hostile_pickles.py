"""Checkpoints whose pickles would do something: they are refused, and nothing is done."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex, TensorStorageMetadata

from megatron_r1.checkpoint.store import Checkpoints
from megatron_r1.checkpoint.torch_dist import TorchDistReader
from megatron_r1.compat.checkpoint_pickles import read_metadata
from megatron_r1.errors import DataError
from megatron_r1.model.mapping import weights
from megatron_r1.model.sharding import layout
from megatron_r1.train.policy import Policy
from tests.checkpoint.test_torch_dist import boxes, repointed, saved


class Payload:
    """What a hostile pickle would do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", [".metadata", "common.pt", "common_state", "tensor", "object"])
def test_hostile_pickles_are_not_run(where: str, trained: tuple[Checkpoints, Policy, Path], tmp_path: Path) -> None:
    checkpoints, policy, folder = trained
    target = tmp_path / "made"
    pickle.loads(pickle.dumps(Payload(target)))
    target.rmdir()  # the payload works
    match where:
        case ".metadata":
            metadata = read_metadata(folder / where)
            vars(metadata)["planner_data"] = Payload(target)
            (folder / where).write_bytes(pickle.dumps(metadata))
        case "common.pt":
            (folder / where).write_bytes(saved({"identity": {"seed": 0}, "more": Payload(target)}))
        case "common_state":  # where megatron-core 0.19 looks if there is no common.pt
            (folder / "common.pt").unlink()
            metadata, content = read_metadata(folder / ".metadata"), saved([Payload(target)])
            (folder / "own.distcp").write_bytes(content)
            metadata.state_dict_metadata["common_state/shard_0_1"] = BytesStorageMetadata()
            metadata.storage_data[MetadataIndex("common_state/shard_0_1")] = _StorageInfo("own.distcp", 0, len(content))
            (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        case "tensor":
            repointed(folder, lambda entry: isinstance(entry, TensorStorageMetadata), saved(Payload(target)))
        case "object":
            repointed(folder, lambda entry: isinstance(entry, BytesStorageMetadata), saved([Payload(target)]))
    with pytest.raises(DataError, match="step_00000001"):
        checkpoints.load(1, policy.trainable, {"reference": [weights(policy.model.module)]})
    assert not target.exists()
    if where in (".metadata", "tensor"):
        with pytest.raises(DataError, match="refuses to load"):
            [reader.read(box) for reader in [TorchDistReader(folder)] for box in boxes(layout(policy.model.hf))]
    assert not target.exists()
