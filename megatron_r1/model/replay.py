"""Routers that choose the experts that they are told (rollout routing replay, R3: arXiv 2510.11370, 3.2).

What the engine has chosen stands in for the router's own top-k; the scores of the chosen experts, their normalisation
and so the gradient are the router's as ever. Upstream has the module for it, `RouterReplay`, which is used router by
router here: its global list knows neither which microbatch a pass belongs to nor padding.
"""

from typing import Any

import torch
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

from megatron_r1.compat.megatron_specs import layer_of


def direct(router: Any, experts: torch.Tensor | None, held: torch.Tensor, replay: bool) -> torch.Tensor | None:
    """Tell a router what its next pass is to choose.

    Args:
        router: a TopKRouter.
        experts: of the positions that it will see, by layer; None = it chooses. [positions, layers, experts a token]
        held: where tokens stand and not padding. [positions]
        replay: else it chooses, and its choice is kept, to be compared.

    Returns:
        The experts of this router's layer, None where it has none: those of MTP layers are not recorded.
        [positions, experts a token]
    """
    if experts is None or layer_of(router) > experts.size(1):
        if router.router_replay is not None:
            router.router_replay.clear_router_replay_action()
        return None
    if router.router_replay is None:
        router.router_replay = RouterReplay()
    told = experts[:, layer_of(router) - 1].long()
    if replay:
        # Padding goes round all experts, so that none gets a row's worth of it.
        places = torch.arange(len(told), device=told.device)[:, None] + torch.arange(told.size(1), device=told.device)
        told = torch.where(held[:, None], told, places % router.config.num_moe_experts)
        router.router_replay.clear_indices()  # else those of every pass are kept
        router.router_replay.set_target_indices(told)
    action = RouterReplayAction.REPLAY_FORWARD if replay else RouterReplayAction.RECORD
    router.router_replay.set_router_replay_action(action)
    return told


def differing(router: Any, told: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """Where tokens stand for which the router has just chosen other experts than `told`. [positions]"""
    chosen = router.router_replay.get_recorded_indices()
    return (chosen.sort(1).values != told.sort(1).values).any(1) & held
