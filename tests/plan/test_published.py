"""The plan against what others have published: 5 % where it is arithmetic, 20 % where it is time.

Which of them the machine's rates were fitted to, and what is not reproduced, stands in docs/planner.md.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.recompute import MemorySection
from megatron_r1.config.sections import ModelSection, ParallelSection
from megatron_r1.model.activations import Tokens
from megatron_r1.model.flops import flops_per_token
from megatron_r1.model.memory import Shape, Work
from megatron_r1.plan.fused import fused_layer_bytes, fused_parts
from megatron_r1.plan.hardware import H100
from megatron_r1.plan.movement import checkpoint, weight_sync
from megatron_r1.plan.rollout import Decoding, Engine, Lengths, cache_tokens
from megatron_r1.plan.state import Copies, Position, Precision, States
from megatron_r1.plan.tensors import count
from megatron_r1.plan.training import Manner, StepTime, TrainingTime

ARITHMETIC, TIME = 0.05, 0.2
GIB, MIB = 2**30, 2**20
V3 = json.loads((Path(__file__).parents[2] / "examples/deepseek_v3/model/config.json").read_text())
QWEN3_235B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
}
QWEN3_30B = QWEN3_235B | {
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
}
BRIDGE = ParallelSection(tensor=2, pipeline=8, virtual_pipeline=4, pipeline_layout="Et|(tt|)*30mL", expert=64)
REPORT = ParallelSection(pipeline=16, pipeline_layout="Et*4|(t*4|)*14tmL", expert=64)
SELECTIVE = MemorySection(recompute="selective", recompute_modules=["mla_up_proj", "mlp"])
PARAMETERS = 671_026_419_200
KEPT = MemorySection()


def shape_of(hf: dict[str, Any], memory: MemorySection = KEPT, mtp: float = 0.3) -> Shape:
    return Shape.of(hf, ModelSection(path=Path(), memory=memory, mtp_loss_coef=mtp))


def step(shape: Shape, own: ParallelSection, gpus: int, batch: int, manner: Manner) -> StepTime:
    """Of rows of 4,096 tokens, one at a time."""
    data = gpus // (own.tensor * own.pipeline)
    worst = max(
        (state for _, _, state in States(shape, own, gpus, Precision()).distinct()), key=lambda one: one.weights
    )
    return TrainingTime(shape, own, Work(gpus, 1, 4096, batch // data), manner, H100).step(worst)


def test_operations_of_a_token() -> None:
    assert flops_per_token(V3, 4096).total == pytest.approx(260.64e9, rel=1e-4)
    trained = step(shape_of(V3), BRIDGE, 1024, 8192, Manner())
    assert trained.flops / trained.tokens == pytest.approx(260.64e9, rel=1e-4)


def test_activations_of_a_layer() -> None:
    """2,236 MiB, and what recomputing saves of them."""
    config = shape_of(V3).config
    parts = {name: 4096 * size / MIB for name, size in fused_parts(config, True).items()}
    assert sum(parts.values()) == pytest.approx(2236, rel=1e-3)
    assert parts["queries"] + parts["keys"] + parts["values"] == pytest.approx(512)
    assert parts["activation"] + parts["shared activation"] == pytest.approx(144)
    assert parts["norm"] + parts["second norm"] == pytest.approx(112)
    full = shape_of(V3, MemorySection(recompute="full")).config
    assert fused_layer_bytes(full, True, Tokens(1, 4096, 1, 1, True)) == 56 * MIB


@pytest.mark.parametrize(
    ("parallel", "gpus", "precision", "gib"),
    [
        (BRIDGE, 1024, Precision(), 20.5),
        (BRIDGE, 1024, Precision(gradient=2, moment=2), 13.6),
        (BRIDGE.model_copy(update={"expert": 32}), 256, Precision(), 51.5),
        (BRIDGE.model_copy(update={"expert": 32}), 256, Precision(gradient=2, moment=2), 34.3),
    ],
)
def test_state_of_a_rank(parallel: ParallelSection, gpus: int, precision: Precision, gib: float) -> None:
    """Those published are of 7.75 sparse layers; a stage in the middle has 8 here."""
    states = States(shape_of(V3), parallel, gpus, precision)
    state = states.of(Position(3, 0, 0))
    assert Copies.of(parallel, gpus).routed == gpus // (8 * parallel.expert)
    total = (state.weights + state.gradients + state.optimizer) / GIB * 7.75 / 8
    assert total == pytest.approx(gib, rel=ARITHMETIC)


FIRST = Manner("bfloat16", "deepep")


@pytest.mark.parametrize(
    ("hf", "memory", "parallel", "gpus", "batch", "manner", "tokens"),
    [
        (V3, SELECTIVE, BRIDGE, 1024, 8192, FIRST, 1297),
        (V3, SELECTIVE, BRIDGE, 1024, 8192, Manner("fp8", "deepep"), 330e12 / 260.64e9),
        # DualPipe hides the exchange; the report's 180 K GPU-hours for a trillion tokens.
        (V3, KEPT, REPORT, 2048, 15360, Manner("fp8", "deepep", overlap=1.0), 1e12 / 180e3 / 3600),
    ],
)
def test_fitted_times(
    hf: dict[str, Any],
    memory: MemorySection,
    parallel: ParallelSection,
    gpus: int,
    batch: int,
    manner: Manner,
    tokens: float,
) -> None:
    assert step(shape_of(hf, memory), parallel, gpus, batch, manner).tokens_per_gpu == pytest.approx(tokens, rel=TIME)


def test_predicted_times() -> None:
    """Of models that no rate was fitted to."""
    layout = "Ettt|" + "ttt|" * 29 + "tt|ttL"
    own = ParallelSection(tensor=2, pipeline=8, virtual_pipeline=4, expert=32, pipeline_layout=layout)
    large = step(shape_of(QWEN3_235B), own, 256, 2048, Manner("fp8", "deepep"))
    assert large.tokens_per_gpu == pytest.approx(1712, rel=TIME)
    assert large.flops_per_gpu == pytest.approx(253e12, rel=TIME)
    small = step(shape_of(QWEN3_30B), ParallelSection(expert=16), 16, 512, FIRST)
    assert small.flops_per_gpu == pytest.approx(299e12, rel=TIME)


def rollout(gpus: int, samples: int, mean: float, longest: int, eager: bool, weight: float = 2.0) -> float:
    """Seconds of one engine; prompts of 150 tokens."""
    shape, engine = shape_of(V3, mtp=0.0), Engine(gpus, weight, 256, eager)
    lengths = Lengths(mean, 0.7, longest).sample(samples)
    room = cache_tokens(shape, engine, count(shape), H100)
    return Decoding(shape, engine, H100).rollout(lengths, 150, room)[0]


def test_rollouts() -> None:
    """NeMo-RL's asynchronous steps, which are as long as the rollout of 512 samples, and verl's rollout of 768."""
    refit = 14.21
    assert rollout(32, 64, 701 - 150, 1536 - 150, eager=False) + refit == pytest.approx(64.1, rel=TIME)
    assert rollout(16, 32, 701 - 150, 1536 - 150, eager=False, weight=1.0) + refit == pytest.approx(59.2, rel=TIME)
    assert rollout(32, 256, 1960, 9632, eager=True) == pytest.approx(1050, rel=TIME)


def test_bytes_that_move() -> None:
    """27 s and 13 s through one port of 50 GB/s; 1.4 TB of weights as a distributed checkpoint."""
    port = replace(H100, network=50e9)
    assert weight_sync(2 * PARAMETERS, port).bytes == pytest.approx(1.34e12, rel=ARITHMETIC)
    assert weight_sync(2 * PARAMETERS, port).seconds == pytest.approx(27, rel=ARITHMETIC)
    assert weight_sync(PARAMETERS, port).seconds == pytest.approx(13, rel=ARITHMETIC)
    assert checkpoint(682.6e9, 2, 32, H100).bytes == pytest.approx(1.4e12, rel=ARITHMETIC)
