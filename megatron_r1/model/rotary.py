"""`config.json`'s rotary position embedding as the arguments of GPTModel.

RoFormer (arXiv 2104.09864) with the two halves of a head rotated together, as in Hugging Face's models; scaled as
in Llama 3.1 (arXiv 2407.21783) where the config says so.
"""

from typing import Any

from megatron_r1.model.family import HFConfig, refuse_other, require


def rotary_arguments(hf: HFConfig) -> dict[str, Any]:
    """What `GPTModel` is told about positions.

    transformers 5 writes `rope_parameters`; older checkpoints have `rope_theta` and `rope_scaling`.

    Raises:
        DataError: a kind of scaling, or numbers of it, that Megatron does not implement.
    """
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    named = {**hf, **rope, "rope_type": rope.get("rope_type", rope.get("type", "default"))}
    refuse_other(named, partial_rotary_factor=1.0)
    arguments = {"position_embedding_type": "rope", "rotary_base": named.get("rope_theta", 10000.0)}
    if require(named, "rope_type", "default", "llama3") == "default":
        return arguments
    # Megatron has these three built in.
    require(named, "low_freq_factor", 1.0)
    require(named, "high_freq_factor", 4.0)
    require(named, "original_max_position_embeddings", 8192)
    return arguments | {"rope_scaling": True, "rope_scaling_factor": require(named, "factor")}
