"""What computes the layers: the choice, Megatron's words for it, what is refused, and Transformer Engine's layer spec.

The spec is built in a process of its own by Megatron's real wrappers around a stand-in (`engine_stand_in`): names,
tables and training are those of a GPU run, kernels are not.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend
from packaging.version import Version

from megatron_r1.compat.fused_adam import let_megatron_make_its_state
from megatron_r1.config.kernels import HOPPER, LOCAL, Fp8Section, KernelsSection
from megatron_r1.config.sections import ModelSection, OptimSection, ParallelSection
from megatron_r1.errors import ConfigError
from megatron_r1.model.build import build_model
from megatron_r1.model.kernel_rules import RULES, Rule, Setting, refuse
from megatron_r1.model.kernels import Machine, choose, kernel_options, refuse_uneven
from megatron_r1.model.parallel import cuda_environment, initialize
from megatron_r1.optim.optimizer import make_trainable
from megatron_r1.optim.optimizer_rules import OPTIM_RULES
from tests.model.conftest import MODEL, section
from tests.model.dense_models import SHAPE
from tests.model.moe_models import MOE_MODELS

H100 = Machine((13, 0), (9, 0), Version("2.11.0"), deep_ep=True)
BARE = dataclasses.replace(H100, transformer_engine=None)
CPU = Machine()
V3: dict[str, Any] = {
    "kv_lora_rank": 512,
    "n_routed_experts": 256,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
}
LAYOUT = {
    "expert_model_parallel_size": 8,
    "pipeline_model_parallel_size": 2,
    "virtual_pipeline_model_parallel_size": 2,
}
"""Of many GPUs."""


def model(**keys: Any) -> ModelSection:
    """[model] of a run."""
    return ModelSection.model_validate({"path": MODEL, "dtype": "bfloat16"} | keys)


def setting(machine: Machine = H100, hf: dict[str, Any] = V3, layout: Any = LAYOUT, **keys: Any) -> Setting:
    """A run with these keys of [model]."""
    of = model(**keys)
    return Setting(of, choose(of, machine), machine, hf, layout)


@pytest.mark.parametrize(
    ("machine", "keys", "layers", "why"),
    [
        (CPU, {}, "local", "no CUDA device"),
        (BARE, {}, "local", "not installed"),
        (H100, {}, "transformer_engine", "version 2.11.0"),
        (H100, {"dtype": "float32"}, "local", "no float32"),
        (H100, {"lora": {}}, "local", "adapters"),
        (H100, {"kernels": {"layers": "local"}}, "local", "says so"),
        (CPU, {"kernels": {"layers": "transformer_engine"}}, "transformer_engine", "says so"),
    ],
)
def test_what_auto_chooses_and_why(machine: Machine, keys: dict[str, Any], layers: str, why: str) -> None:
    chosen = choose(model(**keys), machine)
    assert chosen.layers == layers
    assert why in chosen.said


def test_the_choice_names_the_numbers() -> None:
    assert "FP8 (blockwise)" in choose(model(fp8={}), H100).said
    assert "FP8" not in choose(model(), H100).said


def test_every_key_has_a_default_and_what_is_written_wins() -> None:
    assert HOPPER.keys() == LOCAL.keys() == KernelsSection.model_fields.keys() - {"layers"}
    section = KernelsSection(permute_fusion=False, dispatcher="deepep")
    assert section.resolved("transformer_engine") == HOPPER | {"permute_fusion": False, "dispatcher": "deepep"}
    assert KernelsSection().resolved("local") == LOCAL


def options(machine: Machine, **keys: Any) -> dict[str, Any]:
    return kernel_options(choose(model(**keys), machine), machine)


def test_plain_layers_have_no_switch_on() -> None:
    found = options(CPU)
    assert found["transformer_impl"] == "local"
    assert found["moe_token_dispatcher_type"] == "alltoall"
    assert {name for name, value in found.items() if value is True} == set()
    assert "fp8" not in found


def test_switches_on_a_hopper() -> None:
    found = options(H100)
    assert {name for name, value in found.items() if value is True} == {
        "bias_dropout_fusion", "bias_activation_fusion", "cross_entropy_loss_fusion", "moe_grouped_gemm",
        "moe_permute_fusion",
    }  # fmt: skip
    assert found["attention_backend"] == AttnBackend.auto
    assert options(dataclasses.replace(H100, head_fusion=True))["gradient_accumulation_fusion"] is True


def test_dispatchers_are_two_words_of_megatrons() -> None:
    found = options(H100, kernels={"dispatcher": "hybridep", "dispatcher_sms": 24})
    assert (found["moe_token_dispatcher_type"], found["moe_flex_dispatcher_backend"]) == ("flex", "hybridep")
    assert found["moe_hybridep_num_sms"] == 24
    assert "moe_deepep_num_sms" not in options(H100, kernels={"dispatcher": "deepep"})


@pytest.mark.parametrize(
    ("keys", "megatrons"),
    [
        ({}, {"fp8": "e4m3", "fp8_recipe": "blockwise", "fp8_param": False, "first_last_layers_bf16": False}),
        ({"recipe": "current", "parameters": True}, {"fp8": "hybrid", "fp8_recipe": "tensorwise", "fp8_param": True}),
        (
            {"recipe": "current", "first_bf16_layers": 3},
            {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 3, "num_layers_at_end_in_bf16": 0},
        ),
        (
            {"recipe": "delayed", "weight_gradients": False, "amax_history": 16, "margin": 1},
            {"fp8_wgrad": False, "fp8_amax_history_len": 16, "fp8_amax_compute_algo": "max", "fp8_margin": 1},
        ),
    ],
)
def test_recipes(keys: dict[str, Any], megatrons: dict[str, Any]) -> None:
    found = options(H100, fp8=keys)
    assert megatrons.items() <= found.items()


FULL, SOME = {"recompute": "full"}, {"recompute": "selective"}
BLACKWELL = dataclasses.replace(H100, capability=(10, 0))
ALONE: dict[str, int] = {}
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ('"transformer_engine" without a CUDA', {"machine": CPU, "kernels": {"layers": "transformer_engine"}}),
    ("without the package", {"machine": BARE, "kernels": {"layers": "transformer_engine"}}),
    ('"transformer_engine" with dtype', {"dtype": "float32", "kernels": {"layers": "transformer_engine"}}),
    ('"transformer_engine" with [model.lora]', {"lora": {}, "kernels": {"layers": "transformer_engine"}}),
    ("[model.fp8] with plain", {"machine": CPU, "fp8": {}}),
    ('[model.fp8] with dtype = "float32"', {"dtype": "float32", "fp8": {}}),
    ("[model.fp8] before Hopper", {"machine": dataclasses.replace(H100, capability=(8, 0)), "fp8": {}}),
    ('"blockwise" before Hopper, or with CUDA', {"machine": dataclasses.replace(H100, cuda=(12, 8)), "fp8": {}}),
    ('"mxfp8" before Blackwell', {"fp8": {"recipe": "mxfp8"}}),
    ("Engine before 2.3", {"machine": dataclasses.replace(H100, transformer_engine=Version("2.2")), "fp8": {}}),
    ('format = "hybrid"', {"fp8": {"format": "hybrid"}}),
    ('"delayed" with layers in BF16', {"fp8": {"recipe": "delayed", "last_bf16_layers": 1}}),
    ("first_bf16_layers or last_bf16_layers above", {"fp8": {"recipe": "current", "first_bf16_layers": 31}}),
    ("first_bf16_layers or last_bf16_layers above", {"fp8": {"recipe": "current", "last_bf16_layers": 31}}),
    ("weight_gradients = false without", {"fp8": {"weight_gradients": False}}),
    (
        '"delayed" with "layernorm"',
        {"fp8": {"recipe": "delayed"}, "memory": SOME | {"recompute_modules": ["layernorm"]}},
    ),
    ("with MTP layers and recompute", {"fp8": {"recipe": "delayed"}, "memory": FULL}),
    ("grouped_gemm with plain", {"machine": CPU, "kernels": {"grouped_gemm": True}}),
    ("fusions of Transformer Engine with plain", {"machine": CPU, "kernels": {"cross_entropy_fusion": "te"}}),
    ("kernels.attention with plain", {"machine": CPU, "kernels": {"attention": "flash"}}),
    ('"moe_act" without grouped_gemm', {"machine": CPU, "memory": SOME | {"recompute_modules": ["moe_act"]}}),
    ('"native" with dtype', {"machine": CPU, "dtype": "float32", "kernels": {"cross_entropy_fusion": "native"}}),
    ("plain rotary embeddings", {"kernels": {"rope_fusion": True}}),
    ("without expert parallelism", {"layout": ALONE, "kernels": {"dispatcher": "deepep"}}),
    (
        '"hybridep" without the package',
        {"machine": dataclasses.replace(H100, deep_ep=False), "kernels": {"dispatcher": "hybridep"}},
    ),
    ('"deepep" with dtype', {"dtype": "float32", "kernels": {"dispatcher": "deepep"}}),
    ("shared_expert_overlap with dispatcher", {"kernels": {"dispatcher": "deepep", "shared_expert_overlap": True}}),
    (
        'with "shared_experts" recomputed',
        {"kernels": {"shared_expert_overlap": True}, "memory": SOME | {"recompute_modules": ["shared_experts"]}},
    ),
    ("without experts on several ranks", {"layout": ALONE, "hf": {}, "kernels": {"overlap_expert_exchange": True}}),
    (
        "a pipeline of whole stages",
        {
            "layout": LAYOUT | {"virtual_pipeline_model_parallel_size": None},
            "kernels": {"overlap_expert_exchange": True},
        },
    ),
    ("plain torch's layers, or in float32", {"machine": CPU, "kernels": {"overlap_expert_exchange": True}}),
    (
        "exchange with shared_expert_overlap",
        {"kernels": {"overlap_expert_exchange": True, "shared_expert_overlap": True}},
    ),
    ('exchange with recompute = "full"', {"kernels": {"overlap_expert_exchange": True}, "memory": FULL}),
    (
        "MTP layers on one pipeline stage",
        {"layout": {"expert_model_parallel_size": 8}, "kernels": {"overlap_expert_exchange": True}},
    ),
    ("delay_weight_gradient without", {"kernels": {"delay_weight_gradient": True}}),
    ('"local" without a CUDA', {"machine": CPU, "hf": {}, "kernels": {"cuda_graphs": "local"}}),
    ('"local" with experts', {"kernels": {"cuda_graphs": "local"}}),
    ('"local" with recompute', {"hf": {}, "kernels": {"cuda_graphs": "local"}, "memory": FULL}),
    ("activation_offload without a CUDA", {"machine": CPU, "kernels": {"activation_offload": ["core_attn"]}}),
    ('activation_offload with recompute = "full"', {"kernels": {"activation_offload": ["core_attn"]}, "memory": FULL}),
    ('"attn_proj" without "core_attn"', {"kernels": {"activation_offload": ["attn_proj"]}}),
    ('"moe_act" without grouped_gemm', {"kernels": {"activation_offload": ["moe_act"], "grouped_gemm": False}}),
]
"""Part of a rule's first words -> a run that it refuses."""


@pytest.mark.parametrize(("words", "run"), REFUSED, ids=[words for words, _ in REFUSED])
def test_refused(words: str, run: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as raised:
        refuse(RULES, setting(**run))
    assert words in str(raised.value)


def test_every_rule_has_a_case_and_none_holds_otherwise() -> None:
    cases = [setting(**run) for _, run in REFUSED]
    scalar = dataclasses.replace(setting(kernels={"overlap_expert_exchange": True}), scalar=True)
    assert [rule.what for rule in RULES if not any(rule.holds(case) for case in (*cases, scalar))] == []


@pytest.mark.parametrize(
    "run",
    [
        {"machine": CPU, "layout": ALONE},
        {"machine": CPU, "dtype": "float32", "memory": FULL},
        {"machine": BARE},
        {"layout": ALONE},
        {"fp8": {}},
        {"fp8": {"recipe": "current", "parameters": True, "first_bf16_layers": 1, "last_bf16_layers": 1}},
        {"fp8": {"recipe": "current", "first_bf16_layers": 30, "last_bf16_layers": 30}},
        {"fp8": {"recipe": "current", "first_bf16_layers": 61}, "layout": ALONE},
        {"machine": BLACKWELL, "fp8": {"recipe": "mxfp8"}},
        {"fp8": {}, "memory": SOME | {"recompute_modules": ["layernorm", "mla_up_proj", "moe_act"]}},
        {"kernels": {"dispatcher": "deepep", "overlap_expert_exchange": True, "delay_weight_gradient": True}},
        {
            "hf": V3 | {"rope_scaling": {"type": "yarn"}},
            "kernels": {"rope_fusion": True, "shared_expert_overlap": True},
        },
        {"hf": {}, "layout": ALONE, "kernels": {"cuda_graphs": "local"}},
        {"kernels": {"activation_offload": ["core_attn", "attn_proj", "moe_act"]}},
    ],
)
def test_allowed(run: dict[str, Any]) -> None:
    refuse(RULES, setting(**run))


@pytest.mark.parametrize("rule", [*RULES, *OPTIM_RULES], ids=lambda rule: rule.what[:60])
def test_a_rule_says_why_and_what_to_do(rule: Rule) -> None:
    assert rule.why
    assert rule.instead
    assert rule.what in rule.said


def test_the_page_shows_the_tables() -> None:
    page = (Path(__file__).parents[2] / "docs/kernels.md").read_text()
    rows = [f"| {rule.what} | {rule.why} | {rule.instead} |" for rule in (*RULES, *OPTIM_RULES)]
    for name, value in HOPPER.items():
        both = ["unset" if one is None else json.dumps(one) for one in (value, LOCAL[name])]
        rows.append(f"| `{name}` | `{both[0]}` | `{both[1]}` |")
    assert [row for row in rows if row not in page] == []


@pytest.mark.parametrize(
    ("words", "optim", "run"),
    [
        ("in float32", {"moments": "bfloat16"}, {"dtype": "float32"}),
        ("without Transformer Engine", {"gradients": "bfloat16"}, {"machine": CPU}),
        ("without Transformer Engine", {"offload": 0.5}, {"machine": BARE}),
        ('master = "float16" with', {"master": "float16"}, {"fp8": {"parameters": True}}),
        ("with offload", {"moments": "bfloat16", "offload": 0.5}, {}),
    ],
)
def test_refused_optimizers(words: str, optim: dict[str, Any], run: dict[str, Any]) -> None:
    section = OptimSection(lr=1e-3, **optim)
    assert section.precision_aware
    with pytest.raises(ConfigError, match=words):
        refuse(OPTIM_RULES, dataclasses.replace(setting(**run), optim=section))


def test_a_run_that_asks_for_what_is_not_here_is_told_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("here it is")
    initialize(ParallelSection(), seed=0)
    with pytest.raises(ConfigError, match=r'layers = "transformer_engine" without a CUDA device: .*write "local"'):
        build_model(section(kernels=KernelsSection(layers="transformer_engine"), dtype="bfloat16"), 64)
    with pytest.raises(ConfigError, match=r"\[model.fp8\] with plain torch's layers: .*leave \[model.fp8\] out"):
        build_model(section(fp8=Fp8Section(), dtype="bfloat16"), 64)
    plain = build_model(section(dtype="bfloat16"), 64)
    assert plain.kernels.said == "layers are plain torch's: there is no CUDA device"
    with pytest.raises(ConfigError, match="precision-aware"):
        make_trainable(plain, OptimSection(lr=1e-3, moments="bfloat16"), 1)


@pytest.mark.parametrize(
    ("parallel", "overlap", "queues"),
    [
        ({}, None, None),
        ({"tensor": 2}, None, "1"),
        ({"context": 2}, False, "1"),
        ({"expert": 8}, None, None),
        ({"expert": 8}, True, "32"),
        ({"tensor": 2, "expert": 8}, True, "32"),
    ],
)
def test_queues_of_the_device(parallel: dict[str, int], overlap: bool | None, queues: str | None) -> None:
    """What Megatron-LM 0.19.2 asks for (training/arguments.py:1413)."""
    kernels = KernelsSection(overlap_expert_exchange=overlap)
    assert cuda_environment(ParallelSection(**parallel), kernels).get("CUDA_DEVICE_MAX_CONNECTIONS") == queues


class Product(torch.nn.Module):
    """A linear layer of Transformer Engine, as far as it is looked at."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.fuse_wgrad_accumulation = False
        self.weight = torch.nn.Parameter(torch.zeros(rows, columns))
        self.layer_norm_weight = torch.nn.Parameter(torch.zeros(columns))


@pytest.mark.parametrize(("recipe", "even"), [("blockwise", (48, 576)), ("mxfp8", (32, 64))])
def test_sizes_of_products_in_8_bits(recipe: Any, even: tuple[int, int]) -> None:
    fp8 = Fp8Section(recipe=recipe)
    refuse_uneven(torch.nn.Sequential(Product(*even), torch.nn.Linear(3, 5)), fp8)
    with pytest.raises(ConfigError, match=r"0.weight has shape \[40, 64\]"):
        refuse_uneven(torch.nn.Sequential(Product(40, 64)), fp8)


def test_fused_adam_gets_the_argument_that_megatron_leaves_out() -> None:
    class FusedAdam:
        store_param_remainders = True

        def initialize_state(self, param: torch.Tensor, store_param_remainders: bool) -> None:
            self.said = (param.dtype, store_param_remainders)

    for _ in range(2):
        let_megatron_make_its_state(FusedAdam)
    adam: Any = FusedAdam()
    adam.initialize_state(torch.zeros(1, dtype=torch.bfloat16))
    assert adam.said == (torch.bfloat16, True)
    adam.initialize_state(torch.zeros(1))
    assert adam.said == (torch.float32, False)
    adam.initialize_state(torch.zeros(1, dtype=torch.bfloat16), False)
    assert adam.said == (torch.bfloat16, False)


LATENT = {"MLASelfAttention": 4, "TELinear": 8, "TELayerNormColumnParallelLinear": 9, "TEGroupedMLP": 3}
"""Three layers and one of MTP: two down-projections and two up-projections with norms each, one dense MLP."""
GROUPED_QUERY = {"SelfAttention": 2, "TELayerNormColumnParallelLinear": 2, "TEGroupedMLP": 2}


def config_of(name: str) -> dict[str, Any]:
    if name == "r1_tiny":
        hf: dict[str, Any] = json.loads((MODEL / "config.json").read_text())
        return hf
    config, model_class, own = MOE_MODELS[name]
    return {**config(**{**SHAPE, **own}).to_dict(), "architectures": [model_class.__name__]}


@pytest.mark.parametrize(("name", "modules"), [("r1_tiny", LATENT), ("qwen3_moe", GROUPED_QUERY)])
def test_transformer_engines_spec_is_the_same_model(name: str, modules: dict[str, int], tmp_path: Path) -> None:
    """Losses and gradients alone and packed, three steps, export, and places in a checkpoint: of float32 sums."""
    command = [sys.executable, "-m", "tests.model.engine_program", json.dumps(config_of(name)), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert modules.items() <= found["modules"].items()
    assert "SdpaAttention" not in found["modules"]
    assert found["modules"]["TEDotProductAttention"] == found["modules"]["TransformerLayer"]
    assert found["exported"]
    assert all(found["exported"].values())
    assert found["left"] == []
    assert found["checkpoint"] == [[], []]
    for packed in (False, True):
        assert found[f"names {packed}"] == []
        assert found[f"loss {packed}"] < 1e-5
        assert max(found[f"gradients {packed}"].values()) < 1e-4
    plain, engine = found["trained"]
    assert plain == pytest.approx(engine, rel=1e-5)
    assert plain[0] != plain[2]
    assert found["summed"]
    assert all(found["summed"])
