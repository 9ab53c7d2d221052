"""A Hugging Face folder -> Megatron's GPTModel with its weight map."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1.config.sections import ModelSection
from megatron_r1.errors import ConfigError, DataError, nearest
from megatron_r1.model import lora
from megatron_r1.model.family import Family, HFConfig, Rule
from megatron_r1.model.hf_folder import TensorReader, Weights, read_config
from megatron_r1.model.layers import with_replacements
from megatron_r1.model.mapping import WeightMap
from megatron_r1.model.parallel import device
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
    """The model, the config.json it was made from, and the table of its tensors' names."""

    module: GPTModel
    hf: HFConfig
    map: WeightMap


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
        ConfigError: the run would lose the MTP layer, feed more than the model's context, or needs the vocabulary of
            a model that has none.
    """
    source = read_config(section.path)
    family = _family(source)
    if head == "vocabulary" and is_classifier(source):
        raise ConfigError(f"{section.path} is a reward model: it has no vocabulary to generate with")
    scalar = head == "scalar" or is_classifier(source)
    hf = as_classifier(source) if scalar else source
    limit = hf.get("max_position_embeddings", max_sequence_length)
    if max_sequence_length > limit:
        raise ConfigError(f"sequences of {max_sequence_length} tokens exceed max_position_embeddings {limit}")
    if hf.get("num_nextn_predict_layers") and not section.mtp_loss_coef and not section.load_weights:
        raise ConfigError(
            "config.json has an MTP layer, which mtp_loss_coef = 0 with load_weights = false would neither train nor "
            "export: set mtp_loss_coef > 0, or num_nextn_predict_layers to 0 in config.json"
        )
    module = _module(hf, family.transformer_config(hf, section), max_sequence_length).to(device())
    weight_map = WeightMap(iter(rules(hf)))
    if section.load_weights:
        reader: Weights = weights or TensorReader(section.path)
        if scalar and not is_classifier(source):
            reader = TrunkWeights(reader, family.rules(source), weight_map.rules, module.output_layer.weight)
        weight_map.load(module, reader)
    if section.lora:
        lora.attach(module, section.lora)
    return BuiltModel(module, hf, weight_map)


def build_skeleton(hf: HFConfig) -> GPTModel:
    """The whole model that a `config.json` describes, its MTP layers included, on torch's meta device: no weights.

    Raises:
        DataError: unsupported architecture or value.
    """
    section = ModelSection(path=Path(), load_weights=False, dtype="bfloat16", mtp_loss_coef=1.0)
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


def _module(hf: HFConfig, config: TransformerConfig, max_sequence_length: int) -> GPTModel:
    """On torch's current default device."""
    return (ScalarModel if is_classifier(hf) else GPTModel)(
        config=config,
        transformer_layer_spec=_decoder_spec(config),
        mtp_block_spec=_mtp_spec(config),
        vocab_size=hf["vocab_size"],
        max_sequence_length=max_sequence_length,
        share_embeddings_and_output_weights=hf.get("tie_word_embeddings", False),
        **({"position_embedding_type": "none"} if config.multi_latent_attention else rotary_arguments(hf)),
    )


def _family(hf: HFConfig) -> type[Family]:
    architecture = causal_architecture(hf)
    known = BUILT_IN["family"]
    if architecture not in known:
        raise DataError(
            f"architecture {architecture!r} is not supported{nearest(architecture, known)}; known: {', '.join(known)}"
        )
    family: type[Family] = resolve("family", architecture)
    return family


def _decoder_spec(config: TransformerConfig) -> object:
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=config.normalization)
    return with_replacements(spec)


def _mtp_spec(config: TransformerConfig) -> object | None:
    if not config.mtp_num_layers:
        return None
    layers = get_gpt_decoder_layer_specs(config, use_transformer_engine=False, normalization=config.normalization)
    spec = get_gpt_mtp_block_spec(config, layers[-1], use_transformer_engine=False)
    return with_replacements(spec)


def parameter_count(module: torch.nn.Module) -> int:
    """Parameters on this rank."""
    return sum(param.numel() for param in module.parameters())


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
