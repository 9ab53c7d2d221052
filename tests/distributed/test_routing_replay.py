"""Routing replay under layouts: each rank's routers are told of their own tokens and layers."""

import pytest

from tests.distributed.layouts import BOUND, LAYOUTS, Launcher, Seen, differences, parts

REPLAY = {"run": {"rollout": {"max_model_len": 128, "max_tokens": 32, "temperature": 0.9, "routing_replay": True}}}
RECOMPUTED = {"section": {"memory": {"recompute": "full"}}}

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def replayed(launcher: Launcher) -> Seen:
    """What one process sees."""
    return launcher.run("replayed", {}, parts("rl", **REPLAY))["rl"]


@pytest.mark.parametrize("name", ["tp2", "cp2", "ep2", "pp2_vpp2"])
def test_same_numbers_as_one_process(launcher: Launcher, replayed: Seen, name: str) -> None:
    """Every other pass of the backward pass's own is told what the first was."""
    found = launcher.run(f"{name}_replayed", LAYOUTS[name], parts("rl", **REPLAY, **RECOMPUTED))["rl"]
    measured = differences(found, replayed)
    assert measured["router_bias"] == 0
    assert max(measured.values()) < BOUND, measured


def test_replay_changes_what_is_computed(replayed: Seen, alone: dict[str, Seen]) -> None:
    """Else the numbers above would say nothing."""
    first, _ = (step for step in replayed.seen["figures"] if "rerouted_tokens" in step)
    assert first["rerouted_tokens"] > 0.9
    assert abs(first["own_routing_difference_mean"] - first["logprob_difference_mean"]) > 0.01
    assert max(differences(replayed_without_figures(replayed), alone["rl"]).values()) > 100 * BOUND


def replayed_without_figures(seen: Seen) -> Seen:
    """With the figures of a run without replay alone."""
    extra = ("own_routing_difference_mean", "own_routing_difference_max", "rerouted_choices", "rerouted_tokens")
    figures = [{name: step[name] for name in step if name not in extra} for step in seen.seen["figures"]]
    return Seen(seen.seen | {"figures": figures}, seen.weights)
