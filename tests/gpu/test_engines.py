"""vLLM on the GPU beside the trainer: the same log-probabilities, new weights in place, asleep and awake again.

A transport of weights is one entry of `TRANSPORTS`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch

from megatron_r1.config.sections import OptimSection, RolloutSection
from megatron_r1.loss.cross_entropy import CrossEntropy
from megatron_r1.model import hf_folder
from megatron_r1.model.build import BuiltModel, build_model
from megatron_r1.rollout.fleet import Fleet
from megatron_r1.train.batch import Trajectory, split
from megatron_r1.train.policy import Policy
from megatron_r1.weight_sync.shared_memory import SharedMemorySync
from tests.gpu.small import (
    EVERY,
    LENGTH,
    ON_GPU,
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
TRANSPORTS = {"shared_memory": lambda fleet, folder: SharedMemorySync(fleet, folder / "sync")}
"""Name -> what makes an object with `push(named_tensors, version)`."""
GATE = 0.02
"""Largest mean difference of a token's log-probability between trainer and engine in bfloat16, nats."""
ARGUMENTS = ["--gpu-memory-utilization=0.3", "--enforce-eager", "--enable-sleep-mode"] if ON_GPU else []
Record = Callable[[str, object], None]


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
        arguments=ARGUMENTS,
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
    seconds = sync.push(both.model.export(torch.bfloat16), both.fleet.version + 1)
    near = both.difference()
    record_property(f"mean difference before and after, {transport}, nats", (far, near))
    record_property(f"seconds of a push, {transport}", seconds)
    assert near < GATE < far


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
