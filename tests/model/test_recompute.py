"""What is computed again in the backward pass: it is, and loss, gradients and routing counts are those without."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_r1.config.recompute import MemorySection
from megatron_r1.config.sections import ParallelSection
from megatron_r1.errors import ConfigError
from megatron_r1.model.build import build_model
from megatron_r1.model.parallel import initialize
from tests.model.conftest import section
from tests.model.dense_models import write_dense

FULL = {"recompute": "full"}
TWICE = {
    "core_attn": "decoder.layers.1.self_attention.core_attention",
    "layernorm": "decoder.layers.1.pre_mlp_layernorm",
    "mla_up_proj": "decoder.layers.1.self_attention.linear_kv_up_proj",
    "mlp": "decoder.layers.0.mlp.linear_fc1",
    "moe": "decoder.layers.1.mlp.router",
    "shared_experts": "decoder.layers.1.mlp.shared_experts.linear_fc1",
}
"""Something that each of them computes again."""
ONCE = "decoder.layers.1.self_attention.linear_proj"
MEASURED = tuple[torch.Tensor, dict[str, torch.Tensor], Counter[str]]


def measured(memory: dict[str, object], packed: bool) -> MEASURED:
    """Losses of 96 tokens; gradients, and the tokens each expert got; calls of the modules."""
    initialize(ParallelSection(), seed=3)
    module = build_model(section(memory=MemorySection.model_validate(memory)), 128).module.train()
    calls: Counter[str] = Counter()
    for name, part in module.named_modules():
        part.register_forward_hook(lambda *_, name=name: calls.update([name]))
    tokens = torch.randint(400, (2, 49), generator=torch.Generator().manual_seed(5))
    inputs, labels, packing = tokens[:, :-1], tokens[:, 1:], None
    if packed:
        inputs, labels = inputs.reshape(1, -1), labels.reshape(1, -1)
        ends = torch.tensor([0, 30, 48, 96], dtype=torch.int32)
        packing = PackedSeqParams("thd", ends, ends, max_seqlen_q=48, max_seqlen_kv=48)
    positions = torch.arange(inputs.size(1)).expand_as(inputs)
    loss = module(inputs, positions, None, labels=labels, packed_seq_params=packing)
    kept = loss.detach().clone()
    loss.sum().backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    found |= {name: buffer for name, buffer in module.named_buffers() if name.endswith("local_tokens_per_expert")}
    return kept, found, calls


@pytest.fixture(scope="module")
def plain() -> Callable[[bool], MEASURED]:
    results = {packed: measured({}, packed) for packed in (False, True)}
    return lambda packed: results[packed]


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("name", [*TWICE, "all", "full"])
def test_results_are_those_without(plain: Callable[[bool], MEASURED], name: str, packed: bool) -> None:
    """To the last bit: the same operations are run again. (What reads a norm that is computed again has its gradients
    summed in another order.)"""
    modules = [part for part in TWICE if part != "shared_experts"] if name == "all" else [name]
    memory = FULL if name == "full" else {"recompute": "selective", "recompute_modules": modules}
    loss, found, calls = measured(memory, packed)
    expected_loss, expected, expected_calls = plain(packed)
    assert torch.equal(loss, expected_loss)
    assert found.keys() == expected.keys()
    bound = 2e-6 if "layernorm" in modules else 0.0
    assert [key for key, value in found.items() if (value - expected[key]).norm() > bound * expected[key].norm()] == []
    for part, module in TWICE.items():
        again = name == "full" or part in modules or (name == "all" and part == "shared_experts")
        if name in ("moe", "mlp") and part != name:
            continue  # parts of it are computed again, too
        assert calls[module] == expected_calls[module] * (2 if again else 1), part
    assert calls[ONCE] == expected_calls[ONCE] * (2 if name == "full" else 1)


def test_nothing_is_computed_again_without_gradients() -> None:
    """As in evaluation and for log-probabilities."""
    initialize(ParallelSection(), seed=3)
    module = build_model(section(memory=MemorySection(recompute="full")), 128).module.eval()
    tokens = torch.arange(33)[None]
    with torch.no_grad():
        loss = module(tokens[:, :-1], torch.arange(32)[None], None, labels=tokens[:, 1:])
    assert loss.isfinite().all()


def test_modules_that_the_model_lacks_are_named(tmp_path: Path) -> None:
    write_dense(tmp_path, "qwen3")
    for name in ("mla_up_proj", "moe", "shared_experts"):
        memory = MemorySection(recompute="selective", recompute_modules=["mlp", name])
        with pytest.raises(ConfigError, match=f"Qwen3ForCausalLM has no {name}"):
            build_model(section(tmp_path, memory=memory), 64)
    build_model(section(tmp_path, memory=MemorySection(recompute="selective", recompute_modules=["mlp"])), 64)


@pytest.mark.parametrize(
    "memory",
    [
        {"recompute": "selective"},
        {"recompute_modules": ["mlp"]},
        {"recompute": "full", "recompute_modules": ["mlp"]},
        {"recompute": "selective", "recompute_modules": ["moe", "shared_experts"]},
        {"recompute": "selective", "recompute_modules": ["moe", "moe_act"]},
    ],
)
def test_contradictions_are_refused(memory: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="recompute_modules"):
        MemorySection.model_validate(memory)
