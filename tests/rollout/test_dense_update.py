"""A dense model in a running engine: what Megatron exports, pushed into it, is bitwise what a fresh engine loads."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from megatron_r1.config.sections import ModelSection, ParallelSection
from megatron_r1.model.build import build_model
from megatron_r1.model.parallel import initialize
from megatron_r1.rollout.fleet import Fleet
from megatron_r1.weight_sync.named_tensors import NamedTensors
from megatron_r1.weight_sync.shared_memory import SharedMemorySync
from tests.model.dense_models import write_dense
from tests.rollout.tiny_model import decode, free_port, rollout_section

SHAPE = {"hidden_size": 192, "vocab_size": 400, "eos_token_id": 2}
"""Heads of 32, which vLLM's attention on CPU can do; three query groups, bias, one tensor for embedding and head."""


def test_updated_engine_is_bitwise_a_fresh_one(tmp_path: Path) -> None:
    theirs = [write_dense(tmp_path / name, "qwen2_tied", seed, **SHAPE, num_key_value_heads=3)
              for seed, name in enumerate(("old", "new"))]  # fmt: skip
    initialize(ParallelSection(), seed=0)
    trained = build_model(ModelSection(path=tmp_path / "new", dtype="float32"), 128)

    def start(name: str) -> Fleet:
        return Fleet(rollout_section(free_port()), tmp_path / name, tmp_path / f"run_{name}", "float32", decode)

    prompts = [[1, *range(5, 5 + length)] for length in range(3, 35)]
    with ThreadPoolExecutor(2) as threads:
        updated, fresh = threads.map(start, ("old", "new"))
    with updated, fresh:
        before = updated.sample(prompts, n=4, seed=6)
        sync = SharedMemorySync(updated, tmp_path)
        export = trained.export(torch.float32)
        assert sync.push(NamedTensors(export, export.specs()), version=1) > 0
        after, expected = (fleet.sample(prompts, n=4, seed=6) for fleet in (updated, fresh))
    answers = [[(sample.tokens, sample.logprobs) for group in groups for sample in group]
               for groups in (before, after, expected)]  # fmt: skip
    assert answers[1] == answers[2] != answers[0]
    tokens, logprobs = answers[1][-1]
    with torch.no_grad():
        logits = theirs[1](torch.tensor([prompts[-1] + tokens])).logits[0, len(prompts[-1]) - 1 : -1]
    reference = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(logprobs), reference, atol=1e-4, rtol=0)
