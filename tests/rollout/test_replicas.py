"""New weights by vLLM's NCCL engine (on a CPU: `on_cpu.py`) into an engine of two data-parallel replicas.

Each replica has an engine core of its own and deals with its share of the requests; vLLM tells all of them of an
update, and hands on what the first of them returns.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from megatron_r1.rollout import sender
from megatron_r1.rollout.fan_out import TransferError
from megatron_r1.rollout.fleet import Fleet
from megatron_r1.weight_sync.direct import DirectSync
from megatron_r1.weight_sync.named_tensors import NamedTensors
from tests.model.dense_models import write_dense
from tests.rollout import on_cpu
from tests.rollout.test_dense_update import SHAPE
from tests.rollout.test_direct_update import SMALL, broadcasts
from tests.rollout.tiny_model import decode, free_port, rollout_section

PROMPTS = [[1, number + 3, 2 * number + 5] for number in range(8)]
REPLICAS = ["--data-parallel-size=2", "--distributed-executor-backend=uni"]
"""Without further processes for their workers, of which each has one."""

pytestmark = pytest.mark.timeout(900)  # starts a server of several processes


class Served:
    """An engine of two replicas, and two models that it can have."""

    def __init__(self, fleet: Fleet, folder: Path, models: dict[str, PreTrainedModel]) -> None:
        self.fleet, self.folder, self.models = fleet, folder, models
        buffer = {"transfer_buffer_gib": SMALL}
        self.sync = DirectSync(fleet, "nccl", fleet.section.model_copy(update=buffer))

    def tensors(self, name: str) -> NamedTensors:
        return NamedTensors.of(load_file(self.folder / name / "model.safetensors"))

    @torch.no_grad()
    def away(self, name: str) -> list[float]:
        """Of each sample the largest distance of a log-probability from what transformers makes of a model, nats."""
        found = []
        for prompt, samples in zip(PROMPTS, self.fleet.sample(PROMPTS, n=4, seed=6), strict=True):
            for sample in samples:
                logits = self.models[name](torch.tensor([prompt + sample.tokens])).logits[0, len(prompt) - 1 : -1]
                expected = logits.log_softmax(-1).gather(1, torch.tensor(sample.tokens)[:, None])[:, 0]
                found.append(float((torch.tensor(sample.logprobs) - expected).abs().max()))
        return found


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("replicas")
    models = {
        name: write_dense(folder / name, "qwen2_tied", seed, **SHAPE, num_key_value_heads=3)
        for seed, name in enumerate(("old", "new"))
    }
    receiver = "--worker-extension-cls=tests.rollout.on_cpu_worker.Receiver"
    section = rollout_section(free_port(), start_timeout=600.0, arguments=[*REPLICAS, receiver])
    with pytest.MonkeyPatch.context() as patch:
        on_cpu.install(patch.setattr)
        patch.setattr(sender, "torch", on_cpu.Torch())
        patch.setenv(on_cpu.FAULTS, str(folder))
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # without it vLLM has no executor "uni" on a CPU
        with Fleet(section, folder / "old", folder / "run", "float32", decode) as fleet:
            yield Served(fleet, folder, models)


def test_every_replica_gets_them(served: Served) -> None:
    assert max(served.away("old")) < 1e-4
    served.sync.push(served.tensors("new"), 1)
    assert max(served.away("new")) < 1e-4
    assert min(served.away("old")) > 1e-2


def test_what_has_changed_on_the_way_to_one_is_refused(served: Served) -> None:
    """Of the second replica, whose answers vLLM drops."""
    served.sync.close()
    served.sync._sender._fan_out = None  # a new group, so that its broadcasts are counted from none
    last = list(served.tensors("old").specs)[-1]
    fault = {"kind": "flip", "after": broadcasts(served.tensors("old"), int(SMALL * 2**30)) - 1}
    (served.folder / "2").write_text(json.dumps(fault))
    with pytest.raises(
        TransferError, match=rf"engine-0 \(ranks 1 to 2\) at fault.*rank 2 has got {last} with checksum"
    ):
        served.sync.push(served.tensors("old"), 2)
    served.sync.push(served.tensors("old"), 3)
    assert max(served.away("old")) < 1e-4
