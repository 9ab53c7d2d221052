"""Seconds of a weight update of a running engine, as a multiple of copying the same bytes.

    python tools/bench/weight_sync.py examples/r1_tiny/r1_zero.toml --rollout.port=9000

`SharedMemorySync.push` takes the policy's tensors, writes them to a file in shared memory, has the vLLM server load
that file in place, and waits until the server answers with the new weights. No way of bringing weights into another
process through host memory is faster than one write and one read of as many bytes; that, and one plain copy within
the process, are the yardsticks. The run's own model is measured, and a larger one with random weights, because a
tiny one pays mostly for round trips.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from paired import Comparison, measure, parser, report, seconds

from megatron_r1.config.load import load
from megatron_r1.config.runs import RLConfig
from megatron_r1.config.sections import RolloutSection
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.model import hf_folder
from megatron_r1.model.build import BuiltModel, build_model, parameter_count
from megatron_r1.model.parallel import initialize
from megatron_r1.rollout.fleet import Fleet
from megatron_r1.weight_sync.shared_memory import SHARED_MEMORY, SharedMemorySync

LARGER = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_routed_experts": 16,
    "q_lora_rank": 192,
    "kv_lora_rank": 128,
    "vocab_size": 32000,
    "num_nextn_predict_layers": 0,
}
"""Changes to the run's own config.json; about 95 million parameters."""


@dataclass
class Target:
    """A model in the trainer and in a server."""

    model: BuiltModel
    sync: SharedMemorySync
    dtype: torch.dtype
    version: int = 0

    def push(self) -> float:
        """One update, seconds."""
        self.version += 1
        return self.sync.push(self.model.map.export(self.model.module, self.dtype), self.version)

    @property
    def size(self) -> int:
        """Bytes of one update."""
        return sum(tensor.nbytes for _, tensor in self.model.map.export(self.model.module, self.dtype))


@contextmanager
def served(config: RLConfig, folder: Path, section: RolloutSection) -> Iterator[Target]:
    """The run's model, with a server that holds it; logs go to `folder`."""
    dtype = getattr(torch, config.model.dtype)
    model = build_model(config.model, config.rollout.max_model_len)
    path = config.model.path
    if not config.model.load_weights:
        path = folder / "hf"
        hf_folder.write(path, model.hf, model.map.export(model.module, dtype), config.model.path)
    decode = Tokenizer.load(config.tokenizer or config.model.path).decode
    with Fleet(section, path, folder, config.model.dtype, decode) as fleet:
        yield Target(model, SharedMemorySync(fleet, folder / "sync"), dtype)


def larger(config: RLConfig, folder: Path) -> RLConfig:
    """The run with a larger model of the same architecture and random weights."""
    path = folder / "larger"
    path.mkdir()
    changed = hf_folder.read_config(config.model.path) | LARGER
    (path / "config.json").write_text(json.dumps(changed))
    section = config.model.model_copy(update={"path": path, "load_weights": False})
    tokenizer = config.tokenizer or config.model.path
    return config.model_copy(update={"model": section, "tokenizer": tokenizer})


def write_and_read(size: int) -> Callable[[], float]:
    """Seconds of one write of `size` bytes to a new file in shared memory and one read of it."""
    data, target = memoryview(bytes(size)), memoryview(bytearray(size))

    def work() -> None:
        with tempfile.NamedTemporaryFile(dir=SHARED_MEMORY) as file:
            file.write(data)
            file.seek(0)
            file.readinto(target)

    return lambda: seconds(work)


def copy(size: int) -> Callable[[], float]:
    """Seconds of one copy of `size` bytes within the process."""
    source, target = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)
    return lambda: seconds(lambda: target.copy_(source))


def compare(name: str, target: Target) -> list[Comparison]:
    """Against both yardsticks."""
    size = target.size
    title = f"{name}, {parameter_count(target.model.module) / 1e6:.1f}M parameters, {size / 2**20:.1f} MiB"
    return [
        Comparison(title, "s", "one write and one read of a file in shared memory", target.push, write_and_read(size)),
        Comparison(title, "s", "one copy in memory", target.push, copy(size)),
    ]


def main() -> None:
    chosen, overrides = parser(__doc__, rounds=10).parse_known_args()
    config = load(chosen.run, overrides, RLConfig)
    initialize(config.parallel, config.seed)
    comparisons = []
    with tempfile.TemporaryDirectory(prefix="megatron-r1-bench-") as name:
        folder = Path(name)
        for title, run in (("the run's model", config), ("a larger model", larger(config, folder))):
            with served(run, folder / title.replace(" ", "_"), config.rollout) as target:
                pairs = compare(title, target)
                measure(pairs, chosen.rounds)
                comparisons += pairs
    report("weight sync", comparisons, chosen.json, dtype=config.model.dtype, threads=config.parallel.threads)


if __name__ == "__main__":
    main()
