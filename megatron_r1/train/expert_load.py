"""How evenly a step's tokens go to the experts of each layer, and how far the routing bias leans for it.

Counted is what the routers give. Megatron's own counters are only in routers with a selection bias, and
`finalize_model_grads` clears them once it has moved the bias.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1.compat.megatron_specs import layer_of


class ExpertLoad:
    """The experts' loads, of all ranks, from one `take` to the next, in passes that are trained on.

    Args:
        chunks: this rank's parts of the model, each a GPTModel on its device.
        held: asked while a router routes, where tokens stand and not padding; None = everywhere. [positions]
    """

    def __init__(
        self, chunks: Sequence[torch.nn.Module], held: Callable[[], torch.Tensor | None] = lambda: None
    ) -> None:
        config: Any = chunks[0].config
        self._device = next(chunks[0].parameters()).device
        self._layers: int = config.num_layers + (config.mtp_num_layers or 0)
        self._experts: int = config.num_moe_experts or 0
        self._biased: bool = config.moe_router_enable_expert_bias
        routers: list[Any] = [part for chunk in chunks for part in chunk.modules() if hasattr(part, "expert_bias")]
        self._routers = {layer_of(router): router for router in routers}
        self._counts = {number: self._zeros(self._experts) for number in self._routers}
        for number, router in self._routers.items():
            router.register_forward_hook(_counter(self._counts[number], held))

    def take(self) -> dict[str, float]:
        """Figures of the loads so far, which are forgotten; none without experts. All ranks call it together.

        Those of `balance`, and `bias_spread`: the largest selection bias of a layer less the smallest, mean over
        layers.
        """
        if not self._experts:
            return {}
        rows = self._zeros(self._layers, self._experts + 2)
        for number, router in self._routers.items():
            rows[number - 1, :-2] = self._counts[number]
            rows[number - 1, -2] = router.expert_bias.max() - router.expert_bias.min() if self._biased else 0.0
            rows[number - 1, -1] = 1.0  # how many ranks the spread is summed over
            self._counts[number].zero_()
        dist.all_reduce(rows)
        routed = {number: row for number, row in enumerate(rows.cpu(), 1) if row[:-2].any()}
        figures = balance({number: row[:-2] for number, row in routed.items()})
        if self._biased and routed:
            figures["bias_spread"] = sum(float(row[-2] / row[-1]) for row in routed.values()) / len(routed)
        return figures

    def _zeros(self, *shape: int) -> torch.Tensor:
        """Counts are exact in float64, and every backend sums it."""
        return torch.zeros(shape, dtype=torch.float64, device=self._device)


def balance(loads: Mapping[int, torch.Tensor]) -> dict[str, float]:
    """How uneven loads are.

    `load_violation/N` is MaxVio of layer N (arXiv 2408.15664, section 4.1): the share by which its expert with the most
    tokens is above the mean, 0 in perfect balance. `load_violation` is its mean over layers, `load_violation_max` the
    worst layer's, `idle_experts` the share of experts without a token.

    Args:
        loads: number of a layer, from 1, MTP layers behind the trunk's -> tokens of each of its experts. [experts]
    """
    if not loads:
        return {}
    violations = {number: float(load.max() / load.mean()) - 1 for number, load in loads.items()}
    return {
        "load_violation": sum(violations.values()) / len(violations),
        "load_violation_max": max(violations.values()),
        "idle_experts": float(torch.stack([(load == 0).double().mean() for load in loads.values()]).mean()),
        **{f"load_violation/{number}": value for number, value in violations.items()},
    }


def _counter(
    counts: torch.Tensor, held: Callable[[], torch.Tensor | None]
) -> Callable[[Any, Any, tuple[torch.Tensor, torch.Tensor]], None]:
    """A hook that adds a router's choices to `counts`, once where a pass is computed again for the backward pass."""

    def count(router: torch.nn.Module, _: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        if router.training and torch.is_grad_enabled():
            tokens = held()
            chosen = output[1] if tokens is None else output[1] & tokens[:, None]
            counts.add_(chosen.sum(dim=0))

    return count
