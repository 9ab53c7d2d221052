"""The critic's objective: squared error to the returns, with the step of a value bounded."""

import torch
from pydantic import NonNegativeFloat

from megatron_r1.config.section import Section
from megatron_r1.loss.base import LossInputs, Metrics


class Value:
    """Minimises ``1/2 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2)``, averaged over tokens.

    The value function's part of PPO (Schulman et al., arXiv 1707.06347, eq. 9) with the clip of its reference
    implementation: a value that has moved further than eps towards its return since the rollout has no gradient left.
    """

    class Config(Section):
        """Keys of [critic] that are this loss's."""

        value_clip: NonNegativeFloat = 0.2
        """eps, in units of the reward; 0 = no clip."""

    needs_reference = False

    def __init__(self, config: Config) -> None:
        self.config = config

    def token_weights(self, lengths: list[int]) -> list[float]:
        """Every token counts alike."""
        return [1 / sum(lengths)] * len(lengths)

    def __call__(self, values: torch.Tensor, inputs: LossInputs) -> tuple[torch.Tensor, Metrics]:
        """This microbatch's part of the loss and of the metrics. `values`: [tokens]"""
        assert inputs.old_values is not None
        assert inputs.returns is not None
        errors = (values - inputs.returns) ** 2
        cut = torch.zeros_like(errors)
        if clip := self.config.value_clip:
            near = inputs.old_values + (values - inputs.old_values).clamp(-clip, clip)
            bounded = (near - inputs.returns) ** 2
            cut = (bounded > errors).float()
            errors = torch.maximum(errors, bounded)
        loss = (inputs.weights * errors).sum() / 2
        return loss, {"value_loss": loss.detach(), "value_clip_fraction": (inputs.weights * cut).sum()}
