"""Scripted engines and new weights: files that take turns, transfers that leave nothing behind, sleep."""

import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_r1.errors import EngineError
from megatron_r1.rollout.fan_out import TransferError
from megatron_r1.rollout.member import Member
from megatron_r1.rollout.server import EngineLostError, WeightsNeededError
from tests.rollout.test_engine_faults import PROMPTS, Open, expected, opening, push, tokens, wait_for


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    with opening(tmp_path) as start:
        yield start


def test_no_file_is_written_anew_while_an_engine_that_came_back_reads_it(opened: Open, tmp_path: Path) -> None:
    """Two files take turns, so the next push but one writes to the file that it loads."""
    fleet = opened(dispatch="continuous")
    files = [tmp_path / "even", tmp_path / "odd"]

    def turn(version: int) -> None:
        files[version % 2].write_text(str(version))
        fleet.update_weights(files[version % 2], version)

    turn(1)
    killed = fleet.process(0)
    killed.kill()
    wait_for(lambda: not killed.is_running() or killed.status() == psutil.STATUS_ZOMBIE)
    fleet.breaks(0, "wait")  # when it loads, started again
    fleet.sample(PROMPTS, n=2, seed=3)  # by the other; this one is noticed to be gone
    waits = tmp_path / f"{fleet.section.port}.waits"
    wait_for(waits.exists)
    pushing = threading.Thread(target=lambda: (turn(2), turn(3)))
    pushing.start()
    pushing.join(2.0)  # enough to write version 3, if nothing holds it back
    waits.unlink()
    pushing.join(240.0)
    wait_for(lambda: fleet.figures()["engines_ready"] == 2)
    assert tokens(fleet.sample(PROMPTS, n=2, seed=4)) == expected(2, 4, 3)
    loaded = (tmp_path / f"{fleet.section.port}.loaded").read_text().split()
    assert loaded[:2] == ["1", "1"], "when it came back it loaded what stood in the file that version 1 was in"


@pytest.mark.parametrize("passed", [False, True])
def test_engines_sleep_until_they_get_weights(opened: Open, tmp_path: Path, passed: bool) -> None:
    """One that dies in its sleep holds nobody up."""
    fleet = opened(dispatch="continuous")
    fleet.sleep()
    fleet.process(1).kill()
    if passed:
        fleet.pass_weights(lambda members: send(members, tmp_path, 1), 1)
    else:
        push(fleet, tmp_path, 1)
    assert tokens(fleet.sample(PROMPTS, n=2, seed=4)) == expected(2, 4, 1)
    assert (tmp_path / f"{fleet.section.port}.slept").read_text().split() == ["/sleep", "/wake_up"]
    assert fleet.figures()["engines_lost"] == 1


def send(members: list[Member], folder: Path, version: int) -> None:
    """As a transport that keeps nothing."""
    for member in members:
        (folder / "passing").write_text(str(version))
        member.client.update_weights(folder / "passing", version)


@pytest.mark.parametrize("dispatch", ["batch", "continuous"])
def test_weights_that_nobody_keeps(opened: Open, tmp_path: Path, dispatch: str) -> None:
    """An engine that was lost waits for the next push; the work goes on without it, or says that it has to wait."""
    fleet = opened(dispatch=dispatch)
    fleet.pass_weights(lambda members: send(members, tmp_path, 3), 3)
    assert tokens(fleet.sample(PROMPTS, n=2, seed=3)) == expected(2, 3, 3)
    fleet.process(0).kill()
    if dispatch == "batch":
        with pytest.raises(WeightsNeededError, match="engine-0 has come back without weights"):
            fleet.sample(PROMPTS, n=2, seed=4)
    else:
        assert tokens(fleet.sample(PROMPTS, n=2, seed=4)) == expected(2, 4, 3)
        wait_for(lambda: fleet.figures()["engines_returned"] == 1)
        assert fleet.figures()["engines_ready"] == 1
        fleet.process(1).kill()
        with pytest.raises(WeightsNeededError, match="no engine is left that has weights"):
            fleet.sample(PROMPTS, n=2, seed=4)
        wait_for(lambda: fleet.figures()["engines_returned"] == 2)
    fleet.pass_weights(lambda members: send(members, tmp_path, 3), 3)
    assert fleet.figures()["engines_ready"] == 2
    assert tokens(fleet.sample(PROMPTS, n=2, seed=4)) == expected(2, 4, 3)


def test_a_push_that_fails_loses_who_is_lost_and_holds_the_others(opened: Open, tmp_path: Path) -> None:
    fleet = opened(dispatch="continuous")

    def fail(members: list[Member]) -> None:
        raise TransferError("broken off", {"engine-0": EngineLostError("gone"), "engine-1": EngineError("refuses")})

    with pytest.raises(TransferError, match="broken off"):
        fleet.pass_weights(fail, 1)
    assert fleet.figures()["engines_lost"] == 1
    wait_for(lambda: fleet.figures()["engines_returned"] == 1)
    fleet.pass_weights(lambda members: send(members, tmp_path, 1), 1)
    assert fleet.figures()["engines_ready"] == 2
    assert tokens(fleet.sample(PROMPTS, n=2, seed=4)) == expected(2, 4, 1)
