"""Whether a model can be cut as [parallel] says, before anything of it is built."""

from collections.abc import Iterator, Mapping
from typing import Any

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_r1.config.sections import ParallelSection
from megatron_r1.errors import ConfigError
from megatron_r1.model.family import HFConfig
from megatron_r1.model.parallel import layout_options

_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")


def refuse_uncut(hf: HFConfig) -> None:
    """Check a model's sizes against those of this run's layout.

    Raises:
        ConfigError: a size does not divide, or the stages do not hold the model's layers.
    """
    for text in uncut(hf, layout_options()):
        raise ConfigError(f"[parallel]: {text}")


def options_of(parallel: ParallelSection) -> dict[str, Any]:
    """What `layout_options` says in a run with this section."""
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
        "pipeline_model_parallel_layout": parallel.pipeline_layout,
    }


def uncut(hf: HFConfig, options: Mapping[str, Any]) -> Iterator[str]:
    """What cannot be cut, each with its arithmetic.

    Args:
        hf: the model's `config.json`.
        options: as of `layout_options`.
    """
    tensor, expert, expert_tensor = (
        options.get(f"{name}_parallel_size", 1) for name in ("tensor_model", "expert_model", "expert_tensor")
    )
    experts = next((hf[key] for key in _EXPERTS if hf.get(key)), None)
    width = hf.get("moe_intermediate_size", hf.get("intermediate_size")) if experts else None
    dense = hf.get("intermediate_size") if "moe_intermediate_size" in hf or not experts else None
    groups = None if "kv_lora_rank" in hf else hf.get("num_key_value_heads")
    if expert > 1 and not experts:
        yield f"expert = {expert}, but {hf['architectures'][0]} has no experts"
    for what, number, name, ranks in (
        ("attention heads", hf.get("num_attention_heads"), "tensor", tensor),
        ("key-value heads", groups, "tensor", tensor),
        ("vocabulary rows", hf.get("vocab_size"), "tensor", tensor),
        ("hidden units of a dense MLP", dense, "tensor", tensor),
        ("experts", experts, "expert", expert),
        ("hidden units of an expert", width, "expert_tensor", expert_tensor),
    ):
        if number and number % ranks:
            yield f"the model's {number:,} {what} do not divide by {name} = {ranks}: {number % ranks} are left"
    if (stages := options.get("pipeline_model_parallel_size", 1)) > 1:
        yield from _stages(hf, stages, options)


def _stages(hf: HFConfig, stages: int, options: Mapping[str, Any]) -> Iterator[str]:
    layers = hf["num_hidden_layers"]
    parts = options["virtual_pipeline_model_parallel_size"] or 1
    product = f"pipeline {stages} x virtual_pipeline {parts} = {stages * parts}"
    layout = options["pipeline_model_parallel_layout"]
    if not layout:
        if layers % (stages * parts):
            yield f"the model's {layers} layers do not divide over {product} parts: write a pipeline_layout"
        return
    try:
        held = [part.count(LayerType.decoder) for part in PipelineParallelLayerLayout.parse_str_to_list(layout)]
    except (AssertionError, ValueError) as error:
        yield f"cannot read pipeline_layout = {layout!r}: {error}"
        return
    if len(held) != stages * parts or sum(held) != layers:
        yield (
            f"pipeline_layout = {layout!r} has {sum(held)} layers in {len(held)} parts, but the model has {layers}, "
            f"and {product}"
        )
