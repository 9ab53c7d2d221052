"""Extension of a pretrained model's context by YaRN (arXiv 2309.00071), as in DeepSeek-V3 (arXiv 2412.19437, 4.3)."""

from megatron_r1.config.context_extension import ContextSection
from megatron_r1.errors import ConfigError
from megatron_r1.model.family import HFConfig, require

LATENT = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")
"""Of the families here, those whose positions Megatron scales by YaRN."""


def extended(hf: HFConfig, section: ContextSection) -> HFConfig:
    """The `config.json` of the same model with a longer context.

    It is written in the way of `hf`: `rope_parameters` as by transformers 5, or else `rope_scaling` as in released
    checkpoints.

    Raises:
        ConfigError: an architecture without YaRN; a context that is shorter than the present one, or longer than what
            `factor` is for.
        DataError: `hf` does not say what the present context is.
    """
    architecture = hf["architectures"][0]
    if architecture not in LATENT:
        raise ConfigError(f"[model.context] scales positions by YaRN, which {architecture} does not have here")
    now, wanted = require(hf, "max_position_embeddings"), section.max_position_embeddings
    present = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    original = section.original_max_position_embeddings or present.get("original_max_position_embeddings") or now
    if wanted < now:
        raise ConfigError(f"model.context.max_position_embeddings {wanted} is shorter than the model's context, {now}")
    if wanted > section.factor * original:
        raise ConfigError(
            f"model.context.max_position_embeddings {wanted} is more than factor {section.factor:g} times the original "
            f"context of {original} tokens: raise factor"
        )
    scaling = {
        "factor": section.factor,
        "original_max_position_embeddings": original,
        "beta_fast": section.beta_fast,
        "beta_slow": section.beta_slow,
        "mscale": section.mscale,
        "mscale_all_dim": section.mscale_all_dim,
    }
    if "rope_parameters" in hf:
        theta = require({**hf, **present}, "rope_theta")
        changed = {"rope_parameters": {"rope_type": "yarn", "rope_theta": theta, **scaling}}
    else:
        changed = {"rope_scaling": {"type": "yarn", **scaling}}
    return {**hf, **changed, "max_position_embeddings": wanted}
