"""`megatron-r1 reward-model`: the config of its run file."""

from typing import Literal

from pydantic import PositiveInt

from megatron_r1.config.preference_run import PreferenceRunConfig
from megatron_r1.config.sections import OptimSection


class RewardModelConfig(PreferenceRunConfig):
    """`megatron-r1 reward-model`: a scalar head on a causal model, trained to score responses.

    The defaults are those of DeepSeek-R1's helpful reward model: batch 256, learning rate 6e-6, one epoch, 8192 tokens.
    """

    kind: Literal["pairwise", "pointwise"] = "pairwise"
    """pairwise: Bradley-Terry on pairs. pointwise: binary cross-entropy on labels, 1 = safe."""
    part: Literal["summary", "response"] = "summary"
    """What of a response is scored: what follows its reasoning (R1's helpful reward model), or all (its safety one)."""
    batch: PositiveInt = 256
    optim: OptimSection = OptimSection(lr=6e-6)
