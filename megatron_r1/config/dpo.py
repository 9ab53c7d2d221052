"""`megatron-r1 dpo`: the config of its run file."""

from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megatron_r1.config.preference_run import PreferenceRunConfig
from megatron_r1.config.schedule import largest
from megatron_r1.config.sections import OptimSection


class DPOConfig(PreferenceRunConfig):
    """`megatron-r1 dpo`: direct preference optimisation of a policy on pairs (arXiv 2305.18290)."""

    beta: PositiveFloat = 0.1
    """Strength of the pull towards the starting weights."""
    length_normalised: bool = False
    """Mean instead of sum of a response's log-probabilities (DeepSeekMath eq. 12); it wants a beta about the length of
    a response times larger."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the pairs that are taken to be the wrong way round."""
    batch: PositiveInt = 64
    optim: OptimSection = OptimSection(lr=1e-6, weight_decay=0.0)

    @model_validator(mode="after")
    def _policy_only(self) -> "DPOConfig":
        if largest(self.model.mtp_loss_coef):
            raise ValueError("model.mtp_loss_coef has to be 0: the MTP layers would learn rejected responses too")
        return self
