"""Engines in `h100.py`: weights into a running vLLM, and its tokens/s against vLLM by itself, on one device."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

import torch
from h100_peaks import Peaks
from h100_slice import SERVED_EXPERTS, section, write
from paired import Comparison, measure
from rollout import BareEngine

from megatron_r1.config.load import load
from megatron_r1.config.runs import RLConfig
from megatron_r1.config.schedule import value_at_step
from megatron_r1.model import hf_folder
from megatron_r1.model.build import BuiltModel, build_model
from megatron_r1.rollout.fleet import Fleet, stop_token_ids
from megatron_r1.seeds import stream_seed
from megatron_r1.weight_sync.named_tensors import NamedTensors
from megatron_r1.weight_sync.shared_memory import SharedMemorySync
from megatron_r1.weight_sync.transport import WeightSync

RUN = Path(__file__).parents[2] / "examples/r1_tiny/r1_zero.toml"
"""Its [rollout] is what is changed below."""
SEED = 1


def run(folder: Path, tiny: bool, port: int) -> RLConfig:
    """A run of the slice that is served."""
    model = write(folder / "served", tiny, experts=SERVED_EXPERTS)
    values = {"model.path": model, "rollout.port": port, "model.dtype": "bfloat16"}
    if torch.cuda.is_available():
        values["rollout.transport"] = "ipc"  # lets the engine take handles; files in shared memory it takes anyway
    if tiny:
        values |= {"rollout.max_num_seqs": 16, "rollout.kv_cache_gib": 0.1}
    else:
        values |= {"rollout.max_model_len": 1280, "rollout.max_tokens": 1024, "rollout.max_num_seqs": 256}
        values["rollout.arguments"] = '["--gpu-memory-utilization=0.35"]'
    return load(RUN, [f"--{name}={value}" for name, value in values.items()], RLConfig)


@contextmanager
def served(config: RLConfig, folder: Path) -> Iterator[tuple[BuiltModel, Fleet]]:
    """The trainer's weights at random, and a fleet with the same."""
    described, dtype = config.model.path, getattr(torch, config.model.dtype)
    model = build_model(section(described, dtype=config.model.dtype), config.rollout.max_model_len)
    hf_folder.write(folder / "hf", model.hf, model.export(dtype), described)
    with Fleet(config.rollout, folder / "hf", folder, config.model.dtype, lambda tokens: "") as fleet:
        yield model, fleet


def comparisons(tiny: bool, peaks: Peaks, port: int, rounds: int) -> Iterator[Comparison]:
    """A push of all weights by each transport, and a rollout, each when it is measured."""
    with tempfile.TemporaryDirectory(prefix="megatron-r1-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        config = run(folder, tiny, port)
        model, fleet = stack.enter_context(served(config, folder))
        engine = config.model_copy(update={"model": config.model.model_copy(update={"path": folder / "hf"})})
        bare = stack.enter_context(closing(BareEngine(engine, folder / "bare.log")))
        bare.wait_until_ready()
        found = [push(model, fleet, SharedMemorySync(fleet, folder / "sync"), "one copy to the host", peaks.to_host)]
        if torch.cuda.is_available():
            from megatron_r1.weight_sync.direct import DirectSync  # imports vLLM, which a CPU's part does not need

            direct = DirectSync(fleet, "ipc", config.rollout)
            # What is copied counts once, in `peaks` it counts as read and as written.
            found.append(push(model, fleet, direct, "one copy on the device", peaks.copy / 2))
        for comparison in (*found, rollout(config, fleet, bare, tiny)):
            measure([comparison], rounds)
            yield comparison


def push(model: BuiltModel, fleet: Fleet, sync: WeightSync, limit_name: str, limit: float) -> Comparison:
    """GB/s from the trainer's tensors until the engine answers with them, against what the way allows."""
    export = model.export(torch.bfloat16)
    specs = export.specs()
    size = sum(spec.nbytes for spec in specs.values())

    def ours() -> float:
        return size / 1e9 / sync.push(NamedTensors(iter(export), specs), fleet.version + 1)

    name = f"weights into an engine, {size / 1e9:.2g} GB, {sync.transport.replace('_', ' ')}"
    return Comparison(name, "GB/s", limit_name, ours, lambda: limit)


def rollout(config: RLConfig, fleet: Fleet, bare: BareEngine, tiny: bool) -> Comparison:
    """Tokens/s of prompts with several samples each, seeds and log-probabilities."""
    count, n = (4, 4) if tiny else (32, 8)
    longest = value_at_step(config.rollout.max_tokens, 0)
    length = config.rollout.max_model_len - longest
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 300, (count, length // 2), generator=generator).tolist()
    plain = {
        "temperature": 1.0,
        "top_p": 1.0,
        "max_tokens": longest,
        "stop_token_ids": list(stop_token_ids(config.model.path)),
        "detokenize": False,
        "logprobs": 0,
        "flat_logprobs": True,
    }
    options = [{**plain, "seed": stream_seed(SEED, index, one)} for index in range(count) for one in range(n)]
    repeated = [prompt for prompt in prompts for _ in range(n)]

    def ours() -> float:
        started = time.perf_counter()
        groups = fleet.sample(prompts, n=n, seed=SEED)
        return sum(len(one.tokens) for group in groups for one in group) / (time.perf_counter() - started)

    name = f"rollout, {count} prompts x {n}"
    return Comparison(name, "tokens/s", "LLM.generate", ours, partial(bare.tokens_per_second, repeated, options))
