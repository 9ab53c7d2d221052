"""`quantize` on the GPU, and vLLM that serves what it has written."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_r1.config.sections import RolloutSection
from megatron_r1.rollout.fleet import Fleet
from tests.convert.quantized import IDS, installed, quantize, served, train
from tests.gpu.small import needs_engine, needs_real_gpu
from tests.rollout.tiny_model import decode, free_port

pytestmark = [needs_real_gpu, needs_engine, installed]
BOUND = 0.05
"""Largest mean difference of a token's log-probability from the written numbers run in float32, nats."""
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("trained"))


@pytest.mark.parametrize("finetuned", [False, True], ids=["calibrated", "finetuned"])
def test_vllm_serves_fp8(trained: Path, tmp_path: Path, finetuned: bool, record_property: Record) -> None:
    changes = {"finetune": trained / "text.jsonl", "finetune_steps": 20} if finetuned else {}
    output, figures = quantize(trained, f"fp8_{finetuned}", "fp8", **changes)
    assert abs(figures["heldout_loss_quantised"] - figures["heldout_loss_source"]) < 0.05
    rollout = RolloutSection(
        port=free_port(), max_model_len=32, max_tokens=4, max_num_seqs=128, temperature=1.0,
        arguments=["--gpu-memory-utilization=0.2", "--enforce-eager"],
    )  # fmt: skip
    prompts = [ids[:5] for ids in IDS[::5]]
    with Fleet(rollout, output, tmp_path, "bfloat16", decode) as fleet:
        drawn = fleet.sample(prompts, n=2, seed=0)
    model, differences = served(trained, output), []
    for prompt, samples in zip(prompts, drawn, strict=True):
        for sample in samples:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + sample.tokens])).logits[0, len(prompt) - 1 : -1]
            said = logits.log_softmax(-1).gather(1, torch.tensor(sample.tokens)[:, None])[:, 0]
            differences.append((said - torch.tensor(sample.logprobs)).abs().mean())
    difference = float(torch.stack(differences).mean())
    record_property("mean difference of log-probabilities, nats", difference)
    assert difference < BOUND


def test_four_bits(trained: Path, record_property: Record) -> None:
    """NVFP4 is simulated by a kernel that needs a GPU; trained on, it loses less."""
    texts = {"finetune": trained / "text.jsonl", "finetune_steps": 60, "finetune_batch": 50, "finetune_lr": 1e-3}
    _, figures = quantize(trained, "nvfp4", "nvfp4", **texts)
    before, lost, after = (figures[f"heldout_loss_{name}"] for name in ("source", "quantised", "finetuned"))
    record_property("loss of the source, in NVFP4, trained on", (before, lost, after))
    assert after < lost
