"""What recipes tell vLLM of FP8, read by vLLM's own parser: numbers, blocks, and the layers that stay as they are."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm.config.quantization import ONLINE_QUANT_SHORTHAND_NAMES, QuantizationConfigArgs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig
from vllm.model_executor.layers.quantization.online.fp8 import Fp8PerBlockOnlineLinearMethod
from vllm.utils.argparse_utils import FlexibleArgumentParser

from megatron_r1.cli import CHECKPOINT_VERBS, VERBS
from megatron_r1.cluster.needs import Engine, engines
from megatron_r1.recipe.expand import read_recipe

ROOT = Path(__file__).parents[2]
RELEASED = Path("models/DeepSeek-V3")
"""In FP8."""


def parsed(engine: Engine) -> AsyncEngineArgs:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return AsyncEngineArgs.from_cli_args(parser.parse_args([f"--model={engine.model}", *engine.section.arguments]))


@pytest.fixture(scope="module")
def served() -> dict[tuple[Path, str], AsyncEngineArgs]:
    """Of each different engine of the recipe: model and arguments -> as vLLM reads these."""

    def found() -> Iterator[Engine]:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            plan = read_recipe(Path("examples/r1_671b/recipe.toml"), [], VERBS | CHECKPOINT_VERBS)
        for stage in plan.stages:
            yield from engines(stage.config)

    each = {(engine.model, " ".join(engine.section.arguments)): engine for engine in found()}
    return {key: parsed(engine) for key, engine in each.items()}


def test_what_the_recipe_makes_is_quantised_in_blocks(served: dict[tuple[Path, str], AsyncEngineArgs]) -> None:
    made = [own for (model, _), own in served.items() if model != RELEASED and own.quantization]
    assert len(made) >= 8
    for own in made:
        assert own.quantization in ONLINE_QUANT_SHORTHAND_NAMES
        assert isinstance(own.quantization_config, QuantizationConfigArgs)
        found = OnlineQuantizationConfig(own.quantization_config)
        resolved = found.resolve_quant_method_cls(ReplicatedLinear, "model.layers.3.self_attn.o_proj")
        assert resolved is not None
        assert resolved[-1] is Fp8PerBlockOnlineLinearMethod


def test_what_was_released_in_fp8_is_read_as_it_is(served: dict[tuple[Path, str], AsyncEngineArgs]) -> None:
    assert {own.quantization for (model, _), own in served.items() if model == RELEASED} == {"fp8"}


def test_heads_of_reward_models_are_not_quantised(served: dict[tuple[Path, str], AsyncEngineArgs]) -> None:
    """One row is no whole block."""
    scorers = [own for (model, _), own in served.items() if "helpful" in str(model) or "safety" in str(model)]
    assert len(scorers) == 2
    for own in scorers:
        assert isinstance(own.quantization_config, QuantizationConfigArgs)
        config = OnlineQuantizationConfig(own.quantization_config)
        assert config.resolve_quant_method_cls(ReplicatedLinear, "score") is None


def test_experts_are_exchanged_by_deep_ep(served: dict[tuple[Path, str], AsyncEngineArgs]) -> None:
    spread = [own for own in served.values() if own.enable_expert_parallel]
    assert {own.all2all_backend for own in spread} == {"deepep_low_latency"}
    assert {own.data_parallel_size for own in spread} == {32}
