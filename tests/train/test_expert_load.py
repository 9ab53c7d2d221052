"""Loads of experts against Megatron's own counters, a bias that forces the choice, and numbers worked by hand."""

import json
from pathlib import Path

import pytest
import torch

from megatron_r1.compat.megatron_specs import layer_of
from megatron_r1.config.sections import ModelSection, ParallelSection
from megatron_r1.model.build import BuiltModel, build_model
from megatron_r1.model.parallel import initialize
from megatron_r1.train.expert_load import ExpertLoad, balance

MODEL = Path(__file__).parents[2] / "examples/r1_tiny/model"
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 24,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "vocab_size": 50,
}


def model(folder: Path) -> BuiltModel:
    initialize(ParallelSection(), seed=3)
    return build_model(ModelSection(path=folder, load_weights=False, dtype="float32", init_std=0.08), 64)


def train(built: BuiltModel, rows: int = 3, length: int = 20) -> None:
    tokens = torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(rows))
    positions = torch.arange(length).expand_as(tokens)
    built.module.train()(tokens, positions, None, labels=tokens).sum().backward()


def routers(built: BuiltModel) -> dict[int, torch.nn.Module]:
    return {layer_of(part): part for part in built.module.modules() if hasattr(part, "expert_bias")}


def test_loads_are_those_that_megatron_moves_the_bias_by() -> None:
    built = model(MODEL)
    load = ExpertLoad([built.module])
    for rows in (3, 2):
        train(built, rows)
    theirs = {number: router.local_tokens_per_expert.clone() for number, router in routers(built).items()}
    assert list(theirs) == [2, 3, 4], "the first layer is dense, the last is that of MTP"
    assert all(counts.sum() == (3 + 2) * 20 * 4 for counts in theirs.values())
    assert load.take() == pytest.approx(balance(theirs) | {"bias_spread": 0.0})


def test_a_bias_that_forces_the_choice() -> None:
    """Half of the experts get all tokens: twice the mean each."""
    built = model(MODEL)
    load = ExpertLoad([built.module])
    for router in routers(built).values():
        router.expert_bias.copy_(torch.tensor([9.0, 9, 9, 9, 0, 0, 0, -1]))
    train(built)
    figures = load.take()
    assert figures.pop("bias_spread") == pytest.approx(10)
    assert figures.pop("idle_experts") == 0.5
    layers = [f"load_violation/{number}" for number in (2, 3, 4)]
    assert figures == dict.fromkeys(("load_violation", "load_violation_max", *layers), 1.0)


def test_padding_is_not_counted() -> None:
    built, real = model(MODEL), torch.arange(3 * 20) < 50
    load = ExpertLoad([built.module], lambda: real)
    seen: list[torch.Tensor] = []
    routers(built)[2].register_forward_hook(lambda part, args, out: seen.append(out[1][:50].sum(0).double()))
    train(built)
    assert load.take()["load_violation/2"] == balance({2: seen[0]})["load_violation"]


def test_only_passes_that_are_trained_on_count_and_each_once() -> None:
    built = model(MODEL)
    load = ExpertLoad([built.module])
    train(built)
    expected = load.take()
    config = built.module.config
    config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 1
    train(built)
    with torch.no_grad():
        tokens = torch.arange(40)[None]
        built.module.train()(tokens, tokens, None, labels=tokens)
    built.module.eval()(tokens, tokens, None, labels=tokens)
    assert load.take() == expected
    assert load.take() == {}, "what was taken is forgotten"


def test_routers_without_a_bias_are_counted_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    built = model(tmp_path)
    load = ExpertLoad([built.module])
    chosen: dict[int, list[torch.Tensor]] = {1: [], 2: []}
    for number, router in routers(built).items():
        router.register_forward_hook(lambda part, args, out, seen=chosen[number]: seen.append((out[0] > 0).sum(0)))
    train(built)
    figures = load.take()
    assert figures == pytest.approx(balance({number: counts[0].double() for number, counts in chosen.items()}))
    assert figures["load_violation_max"] > 0
    assert "bias_spread" not in figures


def test_balance_by_hand() -> None:
    loads = {2: torch.tensor([6.0, 2, 4, 0]), 5: torch.tensor([3.0, 3, 3, 3])}
    assert balance(loads) == pytest.approx(
        {
            "load_violation": 0.5,
            "load_violation_max": 1.0,
            "idle_experts": 0.125,
            "load_violation/2": 1.0,
            "load_violation/5": 0.0,
        }
    )


def test_a_dense_model_has_no_loads(tmp_path: Path) -> None:
    dense = {key: value for key, value in MIXTRAL.items() if "experts" not in key}
    (tmp_path / "config.json").write_text(json.dumps(dense | {"architectures": ["LlamaForCausalLM"]}))
    built = model(tmp_path)
    load = ExpertLoad([built.module])
    train(built)
    assert load.take() == {}
