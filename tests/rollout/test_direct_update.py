"""New weights by vLLM's own NCCL and IPC engines into real servers (on a CPU: `on_cpu.py`), undisturbed and not."""

import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file

from megatron_r1.config.sections import ParallelSection
from megatron_r1.model.parallel import initialize
from megatron_r1.model.safetensors_file import Spec
from megatron_r1.rollout import ipc_sender, sender
from megatron_r1.rollout.engine import PREFLIGHT
from megatron_r1.rollout.fan_out import TransferError
from megatron_r1.rollout.fleet import Fleet
from megatron_r1.weight_sync.direct import DirectSync
from megatron_r1.weight_sync.named_tensors import NamedTensors
from megatron_r1.weight_sync.shared_memory import SharedMemorySync
from megatron_r1.weight_sync.transport import preflight
from tests.rollout import on_cpu
from tests.rollout.test_engine_faults import consecutive_ports, wait_for
from tests.rollout.tiny_model import decode, rollout_section

PROMPTS = [[1, number + 3, 2 * number + 5] for number in range(8)]
SMALL = 5e-5
"""GiB: the model's tensors fill it many times, and the largest does not fit."""
FILE = "model.safetensors"


def said(fleet: Fleet) -> list[list[tuple[list[int], list[float]]]]:
    """What the engines answer, bit for bit."""
    groups = fleet.sample(PROMPTS, n=2, seed=6)
    assert {sample.weight_version for group in groups for sample in group} == {fleet.version}
    return [[(sample.tokens, sample.logprobs) for sample in group] for group in groups]


class Served:
    """Two engines, two models, and what the engines say with each, which came as a file."""

    def __init__(self, fleet: Fleet, models: tuple[Path, Path], folder: Path) -> None:
        self.fleet, self.models, self.folder = fleet, models, folder
        self.version = 0
        self.first = said(fleet)  # as they have loaded it themselves
        fleet.update_weights(models[1] / FILE, self.next())
        self.second = said(fleet)
        assert self.second != self.first

    def next(self) -> int:
        self.version += 1
        return self.version

    def tensors(self, model: int) -> NamedTensors:
        return NamedTensors.of(load_file(self.models[model] / FILE))

    def sync(self, transport: Literal["nccl", "ipc"], **changes: float) -> DirectSync:
        settings = {"transfer_buffer_gib": SMALL, **changes}
        return DirectSync(self.fleet, transport, self.fleet.section.model_copy(update=settings))

    def breaks(self, rank: int, kind: str, after: int) -> None:
        (self.folder / str(rank)).write_text(json.dumps({"kind": kind, "after": after}))


@pytest.fixture(scope="module")
def served(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("direct")
    section = rollout_section(
        consecutive_ports(2),
        engines=2,
        transport="ipc",
        start_timeout=600.0,
        arguments=["--worker-extension-cls=tests.rollout.on_cpu_worker.Receiver"],
    )
    with pytest.MonkeyPatch.context() as patch:
        on_cpu.install(patch.setattr)
        for module in (sender, ipc_sender):
            patch.setattr(module, "torch", on_cpu.Torch())
        patch.setenv(on_cpu.FAULTS, str(folder))
        with Fleet(section, models[0], folder, "float32", decode) as fleet:
            yield Served(fleet, models, folder)


@pytest.mark.parametrize("transport", ["nccl", "ipc"])
def test_engines_answer_as_with_a_file(served: Served, transport: Literal["nccl", "ipc"]) -> None:
    sync = served.sync(transport)
    assert sync.push(served.tensors(0), served.next()) > 0
    assert said(served.fleet) == served.first
    sync.push(served.tensors(1), served.next())
    assert said(served.fleet) == served.second
    sync.close()


class Exported:
    """A model's tensors, of which a few are tried: a layer of experts with one of them, a fused matrix with a part."""

    few = ("self_attn.q_a_proj", "mlp.experts.7.", "layernorm", "embed_tokens")

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.tensors.items())

    def specs(self) -> Mapping[str, Spec]:
        return NamedTensors.of(self.tensors).specs

    def of_each_stage(self) -> "Exported":
        chosen = {name: tensor for name, tensor in self.tensors.items() if any(part in name for part in self.few)}
        return Exported(chosen)


@pytest.mark.parametrize("transport", ["nccl", "ipc"])
def test_preflight(served: Served, transport: Literal["nccl", "ipc"]) -> None:
    """Tensors ahead that fill layers in part change nothing of what is pushed, and say how large that is."""
    initialize(ParallelSection(), seed=0)
    sync, export = served.sync(transport), Exported(dict(served.tensors(0)))
    plan = preflight(lambda tensors: sync.push(tensors, PREFLIGHT), export, transport)
    sizes = {name: tensor.nbytes for name, tensor in export.tensors.items()}
    assert max(sizes.values()) > SMALL * 2**30
    assert (plan.tensors, plan.bytes) == (len(sizes), sum(sizes.values()))
    assert {part for part in Exported.few if any(part in name for name in plan.tried)} == set(Exported.few)
    assert plan.tried_bytes == sum(sizes[name] for name in plan.tried) < plan.bytes
    assert plan.seconds > 0
    assert f"by {transport}: {plan.tensors} tensors" in str(plan)
    sync.push(NamedTensors.of(export.tensors), served.next())
    assert said(served.fleet) == served.first
    sync.close()


def test_what_has_changed_on_the_way_is_refused(served: Served) -> None:
    """Named with its rank, engine and tensor; the next push mends what was loaded of it."""
    sync = served.sync("nccl")
    last = list(served.tensors(1).specs)[-1]
    sync.push(served.tensors(0), served.next())
    packs = broadcasts(served.tensors(1), int(SMALL * 2**30))
    served.breaks(rank=2, kind="flip", after=2 * packs - 1)
    with pytest.raises(TransferError, match=rf"engine-1 \(rank 2\) at fault.*rank 2 has got {last} with checksum"):
        sync.push(served.tensors(1), served.next())
    sync.push(served.tensors(1), served.next())
    assert said(served.fleet) == served.second
    sync.close()


def broadcasts(tensors: NamedTensors, buffer: int) -> int:
    """How many buffers vLLM packs: each is sent when it has become larger than it should be."""
    count = filled = 0
    for spec in tensors.specs.values():
        filled += spec.nbytes
        if filled > buffer:
            count, filled = count + 1, 0
    return count + bool(filled)


def test_a_damaged_file_is_refused_and_the_next_is_loaded_whole(served: Served, tmp_path: Path) -> None:
    """vLLM 0.32 by itself would count the tensors that came before the damaged one twice."""
    written = load_file(served.models[0] / FILE)
    with pytest.raises(TransferError, match=r"(?s)engine-\d does not take them.*checksum .* was sent"):
        Damaging(served.fleet, tmp_path, list(written)[len(written) // 2]).push(NamedTensors.of(written), served.next())
    SharedMemorySync(served.fleet, tmp_path).push(NamedTensors.of(written), served.next())
    assert said(served.fleet) == served.first


class Damaging(SharedMemorySync):
    """Changes a byte of one tensor after its checksum was taken."""

    def __init__(self, fleet: Fleet, folder: Path, name: str) -> None:
        super().__init__(self, folder)  # type: ignore[arg-type]
        self._fleet, self._name = fleet, name

    def update_weights(self, path: Path, version: int) -> None:
        with path.open("r+b") as file:
            (header,) = struct.unpack("<Q", file.read(8))
            _, end = json.loads(file.read(header))[self._name]["data_offsets"]
            file.seek(8 + header + end - 1)
            (last,) = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([last ^ 1]))
        self._fleet.update_weights(path, version)


@pytest.mark.timeout(900)  # starts a server
@pytest.mark.parametrize("kind", ["die", "hang"])
def test_an_engine_that_is_lost_on_the_way(served: Served, kind: str) -> None:
    """The error names it; it is started again and takes part in the next push, in a new group."""
    sync, tensors = served.sync("nccl"), served.tensors(0)
    sync.push(tensors, served.next())
    lost = served.fleet.figures()["engines_lost"]
    served.breaks(rank=2, kind=kind, after=broadcasts(tensors, int(SMALL * 2**30)) + 1)
    if kind == "hang":
        sync._sender.timeout = 10.0
    what = r"after rollout\.transfer_timeout = 10 s" if kind == "hang" else ""
    with pytest.raises(
        TransferError, match=rf"(?s)rank 0 had given \d+ of \d+ .*engine-1 \(rank 2\).*{what}"
    ) as failed:
        sync.push(served.tensors(0), served.next())
    (served.folder / "2").unlink(missing_ok=True)
    assert "engine-1" in failed.value.engines
    assert served.fleet.figures()["engines_lost"] > lost
    wait_for(lambda: all(member.ready or member.waiting for member in served.fleet._members), seconds=700.0)
    again = served.sync("nccl")
    again.push(served.tensors(0), served.next())
    assert served.fleet.figures()["engines_ready"] == 2
    assert said(served.fleet) == served.first
    again.close()


def test_source_says_what_it_yields() -> None:
    """Names, shapes and types that vLLM reads ahead are those that come, tensors of the host included."""
    tensors: dict[str, Any] = {"a": torch.ones(3, 2, dtype=torch.bfloat16), "b": torch.nn.Parameter(torch.ones(()))}
    source, named = sender.Source(), NamedTensors.of(tensors)
    source.specs, source.tensors, source.sampled = named.specs, named, {"b"}
    told = [(one.name, one.dtype, one.shape) for one in source.metadata()]
    assert told == [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in source]
    assert (source.last, source.given, list(source.sums)) == ("b", 2, ["b"])
