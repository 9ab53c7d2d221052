"""vLLM on the GPU beside the trainer: the same log-probabilities, new weights in place, asleep and awake again.

A transport of weights is one entry of `TRANSPORTS`; NCCL needs a second GPU, and an engine of its own there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import httpx
import pytest
import torch

from megatron_r1.config.convert import CastConfig
from megatron_r1.config.sections import OptimSection, RolloutSection
from megatron_r1.convert.verbs import run_cast
from megatron_r1.loss.cross_entropy import CrossEntropy
from megatron_r1.model import hf_folder
from megatron_r1.model.build import BuiltModel, build_model
from megatron_r1.rollout.engine import PREFLIGHT
from megatron_r1.rollout.fleet import Fleet
from megatron_r1.train.batch import Trajectory, split
from megatron_r1.train.policy import Policy
from megatron_r1.weight_sync.fp8_weights import Fp8Weights
from megatron_r1.weight_sync.named_tensors import NamedTensors
from megatron_r1.weight_sync.shared_memory import SharedMemorySync
from megatron_r1.weight_sync.transport import WeightSync, preflight
from tests.gpu.small import (
    EVERY,
    LENGTH,
    ON_GPU,
    REHEARSAL,
    losses,
    needs_engine,
    needs_fused,
    needs_real_gpu,
    section,
    texts,
    vocabulary,
    write_config,
)
from tests.rollout.tiny_model import decode, free_port

pytestmark = [needs_fused, needs_engine]
TRANSPORTS: dict[str, Callable[[Fleet, Path], WeightSync]] = {
    "shared_memory": lambda fleet, folder: SharedMemorySync(fleet, folder / "sync"),
    "ipc": lambda fleet, folder: direct(fleet, "ipc"),
}
"""Name -> how weights get into an engine on the trainer's GPU."""
TWO_GPUS = torch.cuda.device_count() > 1
GATE = 0.02
"""Largest mean difference of a token's log-probability between trainer and engine in bfloat16, nats."""
FP8_GATE = 0.05
"""The same of an engine whose products are in FP8, activations too."""
ARGUMENTS = ["--gpu-memory-utilization=0.3", "--enforce-eager", "--enable-sleep-mode"] if ON_GPU else []
ARGUMENTS += ["--worker-extension-cls=tests.rollout.on_cpu_worker.Receiver"] if REHEARSAL else []
Record = Callable[[str, object], None]


def direct(fleet: Fleet, transport: Literal["nccl", "ipc"]) -> WeightSync:
    """Imports vLLM only where it is needed; on a CPU the stand-ins of the CPU tests take part."""
    from megatron_r1.rollout import ipc_sender, sender
    from megatron_r1.weight_sync.direct import DirectSync
    from tests.rollout import on_cpu

    if REHEARSAL:
        on_cpu.install(setattr)
        sender.torch = ipc_sender.torch = on_cpu.Torch()
    return DirectSync(fleet, transport, fleet.section)


@dataclass
class Both:
    """A policy, and the engine that was started with its weights."""

    policy: Policy
    model: BuiltModel
    fleet: Fleet
    folder: Path
    prompts: list[list[int]]

    def difference(self) -> float:
        """Mean absolute difference of the log-probabilities of what the engine draws, nats."""
        drawn = self.fleet.sample(self.prompts, n=4, seed=1)
        pairs = [(prompt, one) for prompt, each in zip(self.prompts, drawn, strict=True) for one in each]
        samples = [Trajectory(prompt + one.tokens, len(one.tokens), one.logprobs) for prompt, one in pairs]
        [packed] = split(samples, 1, 0, CrossEntropy(), self.policy.share(4 * LENGTH))
        said = torch.cat(self.policy.logprobs(packed))
        heard = torch.cat([micro.engine_logprobs for micro in packed])
        return float((said - heard).abs().mean())


@pytest.fixture(scope="module")
def both(v3: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    root = tmp_path_factory.mktemp("engine")
    described = write_config(root / "config", **EVERY)
    model = build_model(section(described, init_std=0.02), LENGTH)
    hf_folder.write(root / "hf", model.hf, model.export(torch.bfloat16), described)
    prompts = texts(vocabulary(v3), 8, 16).tolist()
    rollout = RolloutSection(
        port=free_port(), max_model_len=LENGTH, max_tokens=LENGTH // 2, max_num_seqs=64, kv_cache_gib=0.1,
        transport="ipc", arguments=ARGUMENTS,
    )  # fmt: skip
    policy = Policy(model, OptimSection(lr=1e-3), 20)
    with Fleet(rollout, root / "hf", root, "bfloat16", decode) as fleet:
        yield Both(policy, model, fleet, root, prompts)


def test_log_probabilities(both: Both, record_property: Record) -> None:
    difference = both.difference()
    record_property("mean difference of log-probabilities at the start, nats", difference)
    assert difference < GATE


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_new_weights_arrive(both: Both, v3: Path, transport: str, record_property: Record) -> None:
    """The engine is far from the trained policy, until it is sent the weights."""
    losses(both.policy, v3, 10)
    far = both.difference()
    sync = TRANSPORTS[transport](both.fleet, both.folder)
    seconds = pushed(both, sync)
    near = both.difference()
    sync.close()
    record_property(f"mean difference before and after, {transport}, nats", (far, near))
    record_property(f"seconds of a push, {transport}", seconds)
    assert near < GATE < far


def pushed(both: Both, sync: WeightSync) -> float:
    """Seconds, after some tensors ahead."""
    export = both.model.export(torch.bfloat16)
    preflight(lambda tensors: sync.push(tensors, PREFLIGHT), export, sync.transport)
    return sync.push(NamedTensors(iter(export), export.specs()), both.fleet.version + 1)


@pytest.mark.skipif(not TWO_GPUS, reason="there are no two CUDA devices: NCCL has one rank on each")
def test_new_weights_arrive_over_nccl(both: Both, v3: Path, record_property: Record) -> None:
    """At an engine on the second GPU."""
    section = both.fleet.section.model_copy(update={"port": free_port(), "first_gpu": 1, "transport": "nccl"})
    with Fleet(section, both.folder / "hf", both.folder / "second", "bfloat16", decode) as fleet:
        other = replace(both, fleet=fleet)
        losses(both.policy, v3, 10)
        far, sync = other.difference(), direct(fleet, "nccl")
        seconds = pushed(other, sync)
        near = other.difference()
        sync.close()
    record_property("mean difference before and after, nccl, nats", (far, near))
    record_property("seconds of a push, nccl", seconds)
    assert near < GATE < far


@needs_real_gpu
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_engine_in_fp8(both: Both, v3: Path, transport: str, tmp_path: Path, record_property: Record) -> None:
    """It says what the numbers that it was sent say in bfloat16, but for its own products in FP8."""
    base = both.folder / "hf"
    run_cast(CastConfig(source=base, output=tmp_path / "fp8", dtype="fp8"))
    section_ = both.fleet.section.model_copy(update={"port": free_port()})
    with Fleet(section_, tmp_path / "fp8", tmp_path, "bfloat16", decode) as fleet:
        losses(both.policy, v3, 10)
        export = both.model.export(torch.bfloat16)
        hf_folder.write(tmp_path / "trained", both.model.hf, export)
        run_cast(CastConfig(source=tmp_path / "trained", output=tmp_path / "trained-fp8", dtype="fp8"))
        run_cast(CastConfig(source=tmp_path / "trained-fp8", output=tmp_path / "numbers"))
        numbers = build_model(section(tmp_path / "numbers", load_weights=True), LENGTH)
        served = replace(both, fleet=fleet, policy=Policy(numbers, OptimSection(lr=1e-3), 20))
        far, sync = served.difference(), TRANSPORTS[transport](fleet, tmp_path)
        tensors = Fp8Weights(tmp_path / "fp8", base)(NamedTensors(iter(export), export.specs()))
        seconds = sync.push(tensors, 1)
        near, unquantised = served.difference(), replace(both, fleet=fleet).difference()
        sync.close()
    record_property(f"mean difference in FP8 before and after, {transport}, nats", (far, near))
    record_property(f"the same from the weights before they were quantised, {transport}, nats", unquantised)
    record_property(f"seconds of a push in FP8, {transport}", seconds)
    assert near < FP8_GATE < far


@needs_real_gpu
def test_sleep_and_wake(both: Both, record_property: Record) -> None:
    """Asleep the engine gives memory back; awake it says what it said before, bit for bit."""
    before = both.fleet.sample(both.prompts, n=2, seed=3)
    token, url = both.fleet._token, f"http://127.0.0.1:{both.fleet.section.port}"
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=60) as server:
        full = torch.cuda.mem_get_info()[0]
        server.post("/sleep", params={"level": 1}).raise_for_status()
        freed = torch.cuda.mem_get_info()[0] - full
        server.post("/wake_up").raise_for_status()
    record_property("GiB that sleep gives back", freed / 2**30)
    assert freed > 5 * 2**30
    assert [[one.tokens for one in each] for each in both.fleet.sample(both.prompts, n=2, seed=3)] == [
        [one.tokens for one in each] for each in before
    ]
