"""A real server of FP8 in blocks: weights that the learner has quantised are those that it would have loaded itself."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, Qwen3ForCausalLM

from megatron_r1.config.convert import CastConfig
from megatron_r1.config.sections import ModelSection, ParallelSection
from megatron_r1.convert.verbs import run_cast
from megatron_r1.model.build import build_model
from megatron_r1.model.mapping import Export
from megatron_r1.model.parallel import initialize
from megatron_r1.rollout import ipc_sender, sender
from megatron_r1.rollout.engine import PREFLIGHT
from megatron_r1.rollout.fleet import Fleet
from megatron_r1.types import Sample
from megatron_r1.weight_sync.direct import DirectSync
from megatron_r1.weight_sync.disk import DiskSync
from megatron_r1.weight_sync.fp8_weights import Fp8Weights
from megatron_r1.weight_sync.named_tensors import NamedTensors
from megatron_r1.weight_sync.shared_memory import SharedMemorySync
from megatron_r1.weight_sync.transport import WeightSync, preflight
from tests.model.dense_models import write_dense
from tests.rollout import on_cpu
from tests.rollout.tiny_model import decode, free_port, rollout_section

SHAPE = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 64, "vocab_size": 400, "initializer_range": 0.05}  # fmt: skip
"""Parts of merged matrices have to end where blocks do."""
PROMPTS = [[1, number + 3, 2 * number + 5] for number in range(16)]
TRANSPORTS: dict[str, Callable[[Fleet, Path], WeightSync]] = {
    "shared_memory": SharedMemorySync,
    "disk": DiskSync,
    "nccl": lambda fleet, _: DirectSync(fleet, "nccl", fleet.section),
    "ipc": lambda fleet, _: DirectSync(fleet, "ipc", fleet.section),
}


@dataclass
class Served:
    """An engine, what it answers with the weights that it has loaded itself, and the policies that it is sent."""

    fleet: Fleet
    folder: Path
    old: list[Sample]
    convert: Fp8Weights

    def said(self) -> list[Sample]:
        return [sample for group in self.fleet.sample(PROMPTS, n=2, seed=6) for sample in group]

    def tensors(self, name: str) -> NamedTensors:
        """A policy's, from Megatron."""
        export = self.export(name)
        return self.convert(NamedTensors(iter(export), export.specs()))

    def export(self, name: str) -> Export:
        return build_model(ModelSection(path=self.folder / name, dtype="bfloat16"), 128).export(torch.bfloat16)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("fp8")
    for seed, name in enumerate(("old", "new")):
        write_dense(folder / f"{name}-float32", "qwen3", seed, **SHAPE)
        run_cast(CastConfig(source=folder / f"{name}-float32", output=folder / name))
        run_cast(CastConfig(source=folder / name, output=folder / f"{name}-fp8", dtype="fp8"))
    initialize(ParallelSection(), seed=0)
    section = rollout_section(
        free_port(),
        transport="ipc",
        start_timeout=600.0,
        arguments=["--worker-extension-cls=tests.rollout.fp8_worker.Receiver"],
    )
    with pytest.MonkeyPatch.context() as patch:
        on_cpu.install(patch.setattr)
        for module in (sender, ipc_sender):
            patch.setattr(module, "torch", on_cpu.Torch())
        with Fleet(section, folder / "old-fp8", folder, "bfloat16", decode) as fleet:
            served = Served(fleet, folder, [], Fp8Weights(folder / "old-fp8", folder / "old"))
            served.old = served.said()
            yield served


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_transport(
    served: Served, transport: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The engine says what the numbers that it was sent say; with the old ones, bit for bit what it said at first."""
    sync = TRANSPORTS[transport](served.fleet, tmp_path)
    push = partial(sync.push, version=PREFLIGHT)
    plan = preflight(push, served.export("new"), transport, served.convert)
    assert plan.bytes == sum(tensor.nbytes for tensor in stored(served.folder / "new-fp8").values())
    sync.push(served.tensors("new"), served.fleet.version + 1)
    new = served.said()
    near, far = (difference(new, model) for model in (dequantised(served.folder), unquantised(served.folder)))
    record_property("mean difference from the numbers sent, and from the policy, nats", (near, far))
    assert near < 0.02
    assert far > 3 * near
    sync.push(served.tensors("old"), served.fleet.version + 1)
    assert answers(served.said()) == answers(served.old) != answers(new)
    sync.close()


def answers(samples: list[Sample]) -> list[tuple[list[int], list[float]]]:
    return [(sample.tokens, sample.logprobs) for sample in samples]


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def unquantised(folder: Path) -> PreTrainedModel:
    return Qwen3ForCausalLM.from_pretrained(folder / "new", dtype=torch.float32)


def dequantised(folder: Path) -> PreTrainedModel:
    """The policy with the numbers that `cast` has written."""
    model, numbers = unquantised(folder), stored(folder / "new-fp8")
    for name, parameter in model.named_parameters():
        value = numbers[name].float()
        if (scale := numbers.get(f"{name}_scale_inv")) is not None:
            rows, columns = value.shape
            value *= scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
        parameter.data.copy_(value)
    return model


@torch.no_grad()
def difference(samples: list[Sample], model: PreTrainedModel) -> float:
    """Mean over all tokens of |engine's log-probability - model's|, nats."""
    gaps = []
    for number, sample in enumerate(samples):
        prompt = PROMPTS[number // 2]
        logits = model(torch.tensor([prompt + sample.tokens])).logits[0, len(prompt) - 1 : -1]
        said = logits.log_softmax(-1).gather(1, torch.tensor(sample.tokens)[:, None])[:, 0]
        gaps.append((said - torch.tensor(sample.logprobs)).abs())
    return float(torch.cat(gaps).mean())
