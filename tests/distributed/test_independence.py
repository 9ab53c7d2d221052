"""How a batch is cut into microbatches, packs and ranks does not show in what is learned from it."""

from typing import Any

import pytest

from tests.distributed.layouts import BOUND, LAYOUTS, Launcher, Seen, differences, parts

ONE_BY_ONE, TOGETHER = 1, 10_000
"""Tokens of a pack: a longer sequence has one to itself."""
CUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one_by_one": ({}, {"microbatch": 1, "capacity": ONE_BY_ONE}),
    "together": ({}, {"microbatch": 8, "capacity": TOGETHER}),
    "dp2_together": (LAYOUTS["dp2"], {"microbatch": 4, "capacity": TOGETHER}),
    "cp2_one_by_one": (LAYOUTS["cp2"], {"microbatch": 1, "capacity": ONE_BY_ONE}),
    "tp2_together": (LAYOUTS["tp2"], {"microbatch": 8, "capacity": TOGETHER}),
    "pp2_vpp2_one_by_one": (LAYOUTS["pp2_vpp2"], {"microbatch": 1, "capacity": ONE_BY_ONE}),
}
"""Name -> [parallel], and how it is fed. `pp2_vpp2` takes microbatches in twos: 3 sequences make 4 of them."""
BALANCED = {"section": {"balance_loss_coef": 1.0}}
"""A balance loss that outweighs all else."""

pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize("name", CUTS)
def test_any_cut_learns_the_same(launcher: Launcher, alone: dict[str, Seen], name: str) -> None:
    layout, changes = CUTS[name]
    found = launcher.run(f"cut_{name}", layout, parts("pretrain", "sft", "rl", **changes))
    for part in found:
        measured = differences(found[part], alone[part])
        assert max(measured.values()) < BOUND, (part, measured)


@pytest.mark.parametrize("name", ["dp2_together", "cp2_one_by_one"])
def test_the_balance_loss_is_of_sequences(launcher: Launcher, balanced: dict[str, Seen], name: str) -> None:
    """DeepSeek-V3's equation 17 balances each sequence, whatever else is in its pack."""
    layout, changes = CUTS[name]
    found = launcher.run(f"balanced_{name}", layout, parts("pretrain", "sft", **changes, **BALANCED))
    for part in found:
        measured = differences(found[part], balanced[part])
        assert max(measured.values()) < BOUND, (part, measured)


@pytest.fixture(scope="module")
def balanced(launcher: Launcher, alone: dict[str, Seen]) -> dict[str, Seen]:
    found = launcher.run("balanced", {}, parts("pretrain", "sft", **BALANCED))
    for part, seen in found.items():
        norms = [[step["grad_norm"] for step in each.seen["figures"]] for each in (seen, alone[part])]
        assert abs(norms[0][0] / norms[1][0] - 1) > 0.01, "the balance loss does not show"
    return found
