"""Transformer Engine's layers against plain torch's with the same weights.

Both in bfloat16 are compared with plain torch in float32: fused kernels may not be further from it than plain ones.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_r1.config.sections import OptimSection
from megatron_r1.loss.cross_entropy import CrossEntropy
from megatron_r1.model import hf_folder
from megatron_r1.model.build import BuiltModel, build_model
from megatron_r1.model.parallel import device
from megatron_r1.train.batch import Trajectory, split
from megatron_r1.train.policy import Policy
from tests.gpu.small import EVERY, FUSED, LENGTH, needs_fused, relative, section, texts, vocabulary, write_config
from tests.model import agreement
from tests.model.dense_models import write_dense

pytestmark = needs_fused
ALLOWED = 1.5
"""Times plain torch's own error in bfloat16."""
KINDS = ("v3", "v3_every_expert", "llama")
LLAMA = {"vocab_size": 400, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 64}
Record = Callable[[str, object], None]


@pytest.fixture(scope="module", params=KINDS)
def weights(request: pytest.FixtureRequest, v3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with random weights, large enough for logits to spread."""
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "llama":
        write_dense(root / "hf", "llama", **LLAMA, num_key_value_heads=2, max_position_embeddings=1024)
        return root / "hf"
    described = write_config(root / "config", **(EVERY if request.param == "v3_every_expert" else {}))
    plain = section(described, dtype="float32", init_std=0.06, kernels={"layers": "local"})
    built = build_model(plain, LENGTH)
    hf_folder.write(root / "hf", built.hf, built.export(torch.float32), described)
    return root / "hf"


def built(weights: Path, layers: str, dtype: str) -> BuiltModel:
    # Without Megatron's wrapper gradients stand in `.grad`, where fused products do not add to them.
    kernels = {"layers": layers, "gradient_accumulation_fusion": False}
    return build_model(section(weights, load_weights=True, dtype=dtype, kernels=kernels), LENGTH)


def said(model: BuiltModel, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, and gradients of the mean cross-entropy under the names of a checkpoint."""
    with device():
        logits = agreement.logits(model, tokens).float()
        agreement.cross_entropy(model, tokens).float().mean().backward()
    for parameter in model.module.parameters():
        assert parameter.grad is not None
        parameter.data.copy_(parameter.grad)
    return {"logits": logits, **{name: tensor.clone() for name, tensor in model.export(torch.float32)}}


def test_logits_and_gradients(weights: Path, record_property: Record) -> None:
    tokens = texts(vocabulary(weights), 2, min(LENGTH, 256)).to(device())
    exact, plain, fused = (
        said(built(weights, layers, dtype), tokens)
        for layers, dtype in (("local", "float32"), ("local", "bfloat16"), (FUSED, "bfloat16"))
    )
    assert exact.keys() == plain.keys() == fused.keys()
    errors = {
        name: (relative(fused[name], value), relative(plain[name], value))
        for name, value in exact.items()
        if value.norm() > 0  # experts that no token reached have none
    }
    record_property("errors of logits, fused and plain", errors["logits"])
    worst = max(errors, key=lambda name: errors[name][0] / (errors[name][1] + 1e-3))
    record_property("the worst gradient", (worst, *errors[worst]))
    assert {name: pair for name, pair in errors.items() if pair[0] > ALLOWED * pair[1] + 2e-3} == {}


def test_packed_responses(weights: Path, record_property: Record) -> None:
    """Log-probabilities of responses of unequal length, packed one behind the other."""
    generator, words = torch.Generator().manual_seed(0), vocabulary(weights)
    lengths = torch.randint(4, LENGTH // 2, (12,), generator=generator).tolist()
    samples = [Trajectory(texts(words, 1, length, seed=length)[0].tolist(), length // 2) for length in lengths]
    found = []
    for layers, dtype in (("local", "float32"), ("local", "bfloat16"), (FUSED, "bfloat16")):
        policy = Policy(built(weights, layers, dtype), OptimSection(lr=1e-4), 1)
        [packed] = split(samples, 1, 0, CrossEntropy(), policy.share(LENGTH))
        found.append(torch.cat(policy.outputs(packed)))
    exact, plain, fused = found
    errors = [float((each - exact).abs().mean()) for each in (fused, plain)]
    record_property("mean error of log-probabilities, fused and plain, nats", errors)
    assert errors[0] <= ALLOWED * errors[1] + 1e-3
