"""A Hugging Face folder -> Megatron's GPTModel with its weight map."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1.config.kernels import KernelsSection
from megatron_r1.config.schedule import largest
from megatron_r1.config.sections import ModelSection
from megatron_r1.errors import ConfigError, DataError, nearest
from megatron_r1.model import lora
from megatron_r1.model.context_extension import extended
from megatron_r1.model.family import Family, HFConfig, Rule, check_sizes
from megatron_r1.model.hf_folder import TensorReader, Weights, read_config
from megatron_r1.model.kernel_rules import RULES, Setting, refuse
from megatron_r1.model.kernels import Kernels, Machine, choose, refuse_uneven
from megatron_r1.model.layers import with_replacements
from megatron_r1.model.layout_check import refuse_uncut
from megatron_r1.model.mapping import Export, WeightMap
from megatron_r1.model.parallel import device, layout_options, record_generators, stages
from megatron_r1.model.recompute import check_memory
from megatron_r1.model.rotary import rotary_arguments
from megatron_r1.model.scalar_head import (
    ScalarModel,
    TrunkWeights,
    as_classifier,
    causal_architecture,
    is_classifier,
    scalar_rules,
)
from megatron_r1.registry import BUILT_IN, resolve


@dataclass
class BuiltModel:
    """The part of a model that this rank holds, the config.json that it was made from, and the table of names."""

    chunks: list[GPTModel]
    """One, or this rank's virtual pipeline stages."""
    hf: HFConfig
    map: WeightMap
    setting: Setting
    """What it was asked to be, and where it is."""

    @property
    def kernels(self) -> Kernels:
        """What its layers are computed with."""
        return self.setting.kernels

    @property
    def module(self) -> GPTModel:
        """The only chunk, or the first."""
        return self.chunks[0]

    @property
    def config(self) -> TransformerConfig:
        """Megatron's, the same for all chunks."""
        return self.chunks[0].config

    def export(self, dtype: torch.dtype) -> Export:
        """See `WeightMap.export`."""
        return Export(self.map, self.chunks, dtype)


def build_model(
    section: ModelSection,
    max_sequence_length: int,
    head: Literal["vocabulary", "scalar"] | None = None,
    weights: Weights | None = None,
) -> BuiltModel:
    """Build the model that `<path>/config.json` describes, with its weights or at random.

    Args:
        section: the run's [model].
        max_sequence_length: longest sequence that will be fed.
        head: what the model gives at each position, None = what the folder's architecture says. "scalar" makes of a
            causal model a `ScalarModel` with its trunk, without its MTP layers, and with a new head.
        weights: where they are read; None = from the folder, which is Hugging Face's.

    Raises:
        DataError: unreadable folder, unsupported architecture or value, tensors that do not match.
        ConfigError: the run would lose the MTP layer, feed more than the model's context, needs the vocabulary of
            a model that has none, or asks for kernels that are not there or do not go together.
    """
    source = read_config(section.path)
    if section.context:
        source = extended(source, section.context)
    check_memory(section.memory, source)
    family = _family(source)
    if head == "vocabulary" and is_classifier(source):
        raise ConfigError(f"{section.path} is a reward model: it has no vocabulary to generate with")
    scalar = head == "scalar" or is_classifier(source)
    hf = as_classifier(source) if scalar else source
    limit = hf.get("max_position_embeddings", max_sequence_length)
    if max_sequence_length > limit:
        raise ConfigError(f"sequences of {max_sequence_length} tokens exceed max_position_embeddings {limit}")
    if hf.get("num_nextn_predict_layers") and not largest(section.mtp_loss_coef) and not section.load_weights:
        raise ConfigError(
            "config.json has an MTP layer, which mtp_loss_coef = 0 with load_weights = false would neither train nor "
            "export: set mtp_loss_coef > 0, or num_nextn_predict_layers to 0 in config.json"
        )
    setting = _setting(section, hf, scalar)
    chunks = _chunks(hf, family, section, max_sequence_length)
    if section.fp8:
        for chunk in chunks:
            refuse_uneven(chunk, section.fp8)
    weight_map = WeightMap(iter(rules(hf)))
    if section.load_weights:
        reader: Weights = weights or TensorReader(section.path)
        if scalar and not is_classifier(source):
            reader = TrunkWeights(reader, family.rules(source), weight_map.rules, _score(chunks[-1]))
        weight_map.load(chunks, reader)
    if section.lora:
        for chunk in chunks:
            lora.attach(chunk, section.lora)
    return BuiltModel(chunks, hf, weight_map, setting)


def _setting(section: ModelSection, hf: HFConfig, scalar: bool) -> Setting:
    """What the layers are computed with, and where; raises `ConfigError` where it does not go together."""
    machine = Machine.here()
    setting = Setting(section, choose(section, machine), machine, hf, layout_options(), scalar)
    refuse(RULES, setting)
    if setting["cuda_graphs"] != "none":
        record_generators()
    return setting


def _score(chunk: GPTModel) -> torch.Tensor | None:
    """The new head, where it stands."""
    head = getattr(chunk, "output_layer", None)
    return None if head is None else head.weight


def _chunks(hf: HFConfig, family: type[Family], section: ModelSection, max_sequence_length: int) -> list[GPTModel]:
    """This rank's part of the model on its device.

    Raises:
        ConfigError: the model cannot be cut as [parallel] says.
    """
    refuse_uncut(hf)
    try:
        config = family.transformer_config(hf, section)
        return [_module(hf, config, max_sequence_length, stage).to(device()) for stage in stages()]
    except (ValueError, AssertionError) as error:
        if not any(size for name, size in layout_options().items() if name.endswith("_size") and size not in (None, 1)):
            raise
        raise ConfigError(f"[parallel] does not fit the model {section.path}: {error}") from error


def build_skeleton(hf: HFConfig) -> GPTModel:
    """The whole model that a `config.json` describes, its MTP layers included, on torch's meta device: no weights.

    Raises:
        DataError: unsupported architecture or value.
    """
    plain = KernelsSection(layers="local")  # the names are the same, and Transformer Engine's modules take memory
    section = ModelSection(path=Path(), load_weights=False, dtype="bfloat16", mtp_loss_coef=1.0, kernels=plain)
    config = _family(hf).transformer_config(hf, section)
    config.perform_initialization, config.use_cpu_initialization = False, True
    with torch.device("meta"):
        return _module(hf, config, hf.get("max_position_embeddings", 1))


def rules(hf: HFConfig) -> list[Rule]:
    """The table of names of the model that a `config.json` describes, its MTP layers' included.

    Raises:
        DataError: unsupported architecture.
    """
    table = _family(hf).rules(hf)
    return list(scalar_rules(table) if is_classifier(hf) else table)


def _module(hf: HFConfig, config: TransformerConfig, max_sequence_length: int, stage: int | None = None) -> GPTModel:
    """A virtual pipeline stage, on torch's current default device."""
    return (ScalarModel if is_classifier(hf) else GPTModel)(
        config=config,
        transformer_layer_spec=_decoder_spec(config, stage),
        mtp_block_spec=_mtp_spec(config, stage),
        vocab_size=hf["vocab_size"],
        max_sequence_length=max_sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        share_embeddings_and_output_weights=hf.get("tie_word_embeddings", False),
        vp_stage=stage,
        **({"position_embedding_type": "none"} if config.multi_latent_attention else rotary_arguments(hf)),
    )


def _family(hf: HFConfig) -> type[Family]:
    architecture = causal_architecture(hf)
    known = BUILT_IN["family"]
    if architecture not in known:
        raise DataError(
            f"architecture {architecture!r} is not supported{nearest(architecture, known)}; known: {', '.join(known)}"
        )
    check_sizes(hf)
    family: type[Family] = resolve("family", architecture)
    return family


def _decoder_spec(config: TransformerConfig, stage: int | None) -> object:
    fused = _fused(config)
    options = {"use_transformer_engine": fused, "normalization": config.normalization}
    return _replaced(get_gpt_decoder_block_spec(config, vp_stage=stage, **options), config)


def _mtp_spec(config: TransformerConfig, stage: int | None) -> object | None:
    if not config.mtp_num_layers:
        return None
    fused = _fused(config)
    layers = get_gpt_decoder_layer_specs(config, use_transformer_engine=fused, normalization=config.normalization)
    spec = get_gpt_mtp_block_spec(config, layers[-1], use_transformer_engine=fused, vp_stage=stage)
    return _replaced(spec, config)


def _replaced(spec: Any, config: TransformerConfig) -> Any:
    return with_replacements(spec, _fused(config), getattr(config, "q_lora_rank", None) is not None)


def _fused(config: TransformerConfig) -> bool:
    return bool(config.transformer_impl == "transformer_engine")


def check_tokenizer(model: BuiltModel, vocab_size: int, eos_id: int) -> None:
    """Compare a tokenizer with the model it is used with.

    Raises:
        ConfigError: it has ids that the model's embedding does not have, or another end-of-sequence token than
            config.json names, so that no response would ever end.
    """
    rows = model.hf["vocab_size"]
    if vocab_size > rows:
        raise ConfigError(
            f"the tokenizer has {vocab_size} tokens, but the model's vocab_size is {rows}: "
            "use the model's own tokenizer, or a config.json with a vocab_size that large"
        )
    named = model.hf.get("eos_token_id")
    if eos_id not in (named if isinstance(named, list) else [named]):
        raise ConfigError(
            f"the tokenizer ends a text with token {eos_id}, but config.json's eos_token_id is {named}: "
            "use the model's own tokenizer, or correct config.json"
        )
