"""What goes wrong first when a model is cut: matrices of two stages, heads of one number, sums over sequences."""

from typing import Any

import pytest

from tests.distributed.layouts import BOUND, LAYOUTS, Launcher, Seen, differences, parts

CASES: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "tied_embeddings": (
        parts("pretrain", model="tied"),
        ["tp2", "pp2", "cp2", "tp2_pp2", "pp2_vpp2"],
    ),
    "reward_model": (parts("reward_model", model="reward"), ["tp2", "pp2", "cp2", "dp2", "tp2_pp2"]),
    "dpo": (parts("dpo"), ["tp2", "pp2", "cp2", "dp2"]),
    "critic": (
        parts(
            "rl",
            critic=True,
            run={
                "advantage": {"type": "gae", "lam": 0.9, "kl_coef": 0.1},
                "loss": {"type": "ppo", "kl_coef": 0.1},
            },
        ),
        ["tp2", "pp2", "cp2", "dp2"],
    ),
    "gspo": (
        parts("rl", run={"loss": {"type": "gspo", "clip_eps": 0.2, "clip_eps_high": 0.3, "kl_coef": 0.1}}),
        ["cp2_dp2"],
    ),
}
"""Name -> what is run, and the layouts where it is."""

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def expected(launcher: Launcher) -> dict[str, dict[str, Seen]]:
    """What one process sees of each case."""
    return {name: launcher.run(f"{name}_alone", {}, run) for name, (run, _) in CASES.items()}


@pytest.mark.parametrize(("case", "name"), [(case, name) for case, (_, names) in CASES.items() for name in names])
def test_same_numbers_as_one_process(
    launcher: Launcher, expected: dict[str, dict[str, Seen]], case: str, name: str
) -> None:
    run, _ = CASES[case]
    found = launcher.run(f"{case}_{name}", LAYOUTS[name], run)
    for part, seen in found.items():
        assert seen.seen.get("start") == expected[case][part].seen.get("start")
        measured = differences(seen, expected[case][part])
        assert max(measured.values()) < BOUND, (part, measured)
