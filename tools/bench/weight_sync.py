"""Seconds of a weight update of a running engine, as a multiple of copying the same bytes.

    python tools/bench/weight_sync.py examples/r1_tiny/r1_zero.toml --rollout.port=9000

For each transport that this machine has. `push` takes the policy's tensors, puts them where the engines can read them,
has the vLLM server load them in place, and waits until the server answers with the new weights; the transport by itself
ends where the engines could begin to read. The yardstick is one plain copy of as many bytes within the process. The
run's own model is measured, and two larger ones of its architecture with random weights (20M and 135M parameters, with
dense MLPs), because a tiny one pays for round trips alone.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch
from paired import Comparison, measure, parser, report, seconds

from megatron_r1.config.load import load
from megatron_r1.config.runs import RLConfig
from megatron_r1.config.sections import RolloutSection
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.model import hf_folder
from megatron_r1.model.build import BuiltModel, build_model
from megatron_r1.model.parallel import initialize
from megatron_r1.model.placement import parameter_counts
from megatron_r1.rollout.fleet import Fleet
from megatron_r1.weight_sync.named_tensors import NamedTensors
from megatron_r1.weight_sync.transport import TakesWeights, WeightSync, open_sync

DENSE = {"first_k_dense_replace": 1000, "num_nextn_predict_layers": 0, "q_lora_rank": 192, "kv_lora_rank": 128}
LARGER = {
    "20M": {
        **DENSE,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 9,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "vocab_size": 8960,
    },
    "135M": {
        **DENSE,
        "hidden_size": 640,
        "intermediate_size": 1536,
        "num_hidden_layers": 26,
        "num_attention_heads": 10,
        "num_key_value_heads": 10,
        "vocab_size": 34432,
    },
}
"""Changes to the run's own config.json."""
TRANSPORTS: tuple[Literal["shared_memory", "disk"], ...] = ("shared_memory", "disk")


class Reached:
    """An engine that is content when it could begin to read."""

    def update_weights(self, path: Path, version: int) -> None:
        """Nothing to do."""


@dataclass
class Target:
    """A model in the trainer and in a server."""

    model: BuiltModel
    fleet: Fleet
    folder: Path
    dtype: torch.dtype
    version: int = 0

    def push(self, sync: WeightSync) -> float:
        """One update, seconds."""
        self.version += 1
        export = self.model.export(self.dtype)
        return sync.push(NamedTensors(export, export.specs()), self.version)

    @property
    def size(self) -> int:
        """Bytes of one update."""
        return sum(tensor.nbytes for _, tensor in self.model.export(self.dtype))


@contextmanager
def served(config: RLConfig, folder: Path) -> Iterator[Target]:
    """The run's model, with a server that holds it; logs go to `folder`."""
    dtype = getattr(torch, config.model.dtype)
    model = build_model(config.model, config.rollout.max_model_len)
    path = config.model.path
    if not config.model.load_weights:
        path = folder / "hf"
        hf_folder.write(path, model.hf, model.export(dtype), config.model.path)
    decode = Tokenizer.load(config.tokenizer or config.model.path).decode
    with Fleet(config.rollout, path, folder, config.model.dtype, decode) as fleet:
        yield Target(model, fleet, folder, dtype)


def larger(config: RLConfig, folder: Path, changes: Mapping[str, int]) -> RLConfig:
    """The run with a larger model of the same architecture and random weights."""
    path = folder / "config"
    path.mkdir(parents=True)
    changed = {**hf_folder.read_config(config.model.path), **changes}
    (path / "config.json").write_text(json.dumps(changed))
    section = config.model.model_copy(update={"path": path, "load_weights": False})
    tokenizer = config.tokenizer or config.model.path
    return config.model_copy(update={"model": section, "tokenizer": tokenizer})


def copy(size: int) -> Callable[[], float]:
    """Seconds of one copy of `size` bytes within the process."""
    source, target = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)
    return lambda: seconds(lambda: target.copy_(source))


def compare(name: str, target: Target, section: RolloutSection) -> list[Comparison]:
    """Each transport against a copy in memory, with and without the engine's part."""
    bytes_ = target.size
    count = parameter_counts(target.model.chunks).total / 1e6
    found = []
    for transport in TRANSPORTS:
        chosen = section.model_copy(update={"transport": transport})
        for part, engine in (("alone", Reached()), ("push", target.fleet)):
            sync = open_sync(chosen, cast(TakesWeights, engine), target.folder / f"{transport}_{part}")
            title = f"{name} ({count:.1f}M parameters, {bytes_ / 2**20:.1f} MiB), {transport}, {part}"
            limit = 1.5 if (transport, part) == ("shared_memory", "alone") else None
            found.append(Comparison(title, "s", "one copy in memory", partial(target.push, sync), copy(bytes_), limit))
    return found


def main() -> None:
    chosen, overrides = parser(__doc__, rounds=10).parse_known_args()
    config = load(chosen.run, overrides, RLConfig)
    initialize(config.parallel, config.seed)
    comparisons = []
    with tempfile.TemporaryDirectory(prefix="megatron-r1-bench-") as name:
        folder = Path(name)
        runs = {"the run's model": config}
        runs |= {title: larger(config, folder / title, changes) for title, changes in LARGER.items()}
        for number, (title, run) in enumerate(runs.items()):
            with served(run, folder / str(number)) as target:
                pairs = compare(title, target, run.rollout)
                measure(pairs, chosen.rounds)
                comparisons += pairs
    report("weight sync", comparisons, chosen.json, dtype=config.model.dtype, threads=config.parallel.threads)


if __name__ == "__main__":
    main()
