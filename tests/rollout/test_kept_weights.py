"""A folder of weights is there by its name for engines that come back, until the next one is loaded."""

import shutil
from pathlib import Path

from megatron_r1.rollout.fleet import Fleet
from tests.rollout.test_engine_faults import PROMPTS, expected, opening, tokens, wait_for


def push(fleet: Fleet, folder: Path, version: int) -> None:
    """As `DiskSync` does."""
    made = folder / f"weights-{version}"
    made.mkdir()
    (made / "weights").write_text(str(version))
    fleet.update_weights(made, version)
    for older in folder.glob("weights-*"):
        if older != made:
            shutil.rmtree(older)


def test_one_that_comes_back_loads_the_newest_folder(tmp_path: Path) -> None:
    """Two folders have come and gone since it was lost, and nothing is pushed afterwards."""
    with opening(tmp_path) as opened:
        fleet = opened(dispatch="continuous")
        push(fleet, tmp_path, 1)
        fleet.process(0).kill()
        fleet.sample(PROMPTS, n=2, seed=3)
        push(fleet, tmp_path, 2)
        push(fleet, tmp_path, 5)
        wait_for(lambda: fleet.figures()["engines_ready"] == 2)
        assert tokens(fleet.sample(PROMPTS, n=2, seed=3)) == expected(2, 3, 5)
        assert fleet.figures()["engine-0/weights"] == fleet.figures()["engine-1/weights"] == 5
