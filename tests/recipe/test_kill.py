"""Killed, interrupted, started twice: nothing runs on, nothing is mixed, the same command goes on."""

import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress

import psutil
import pytest

from tests.recipe.conftest import Recipe, until

Kill = Callable[["subprocess.Popen[bytes]"], list[psutil.Process]]
DOCUMENTS = 3000
SUMS = {"type": "reasoning_gym", "dataset": "chain_sum", "options": {"max_terms": 2, "max_digits": 1}}


@pytest.fixture
def slow(recipe: Recipe) -> Recipe:
    """A quick stage, then one that takes seconds."""
    recipe.tree["stages"] = {
        "first": recipe.tree["stages"]["first"],
        "corpus": {
            "verb": "data generate", "task": SUMS, "documents": DOCUMENTS, "validation_documents": 5,
            "quality": {"careful": 1.0}, "needs": ["first"],
        },
    }  # fmt: skip
    return recipe


def verb(process: "subprocess.Popen[bytes]") -> psutil.Process | None:
    """The process of the stage `corpus`, once it is at work."""
    for member in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # those of an earlier stage may be just ending
            line = member.cmdline()
            if "generate" in line and "megatron_r1.recipe.keeper" not in line:
                return member if member.memory_info().rss > 40 * 2**20 else None
    return None


def test_kill_9_in_a_stage(slow: Recipe, kill: Kill) -> None:
    """The stage ends with the recipe; the same command waits for that and goes on in the same folder."""
    process = slow.start()
    until(lambda: verb(process), process)
    assert slow.states() == {"first": "done", "corpus": "running"}
    finished = (slow.output / "first/summary.json").stat()
    folder = (slow.output / "corpus").stat().st_ino
    (slow.output / "corpus/mine.txt").write_text("mine")
    family = kill(process)
    assert len(family) >= 2
    states = slow.ran()
    assert not [member for member in family if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]
    assert states == {"first": "unchanged", "corpus": "ran"}
    assert (slow.output / "first/summary.json").stat() == finished
    assert (slow.output / "corpus").stat().st_ino == folder
    assert (slow.output / "corpus/mine.txt").exists()
    lineage = slow.read("corpus/lineage.json")
    attempts = slow.read("corpus/stage.json")["attempts"]
    assert lineage["attempts"] == len(attempts) == 2
    assert lineage["seconds"] == pytest.approx(sum(attempt["seconds"] for attempt in attempts), abs=0.01)
    assert len((slow.output / "corpus/train.jsonl").read_text().splitlines()) == DOCUMENTS
    assert not (slow.output / "superseded").exists()


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130)])
def test_a_signal_is_handed_on_and_waited_for(slow: Recipe, sent: signal.Signals, code: int) -> None:
    process = slow.start()
    child = until(lambda: verb(process), process)
    os.killpg(process.pid, sent)
    assert process.wait(60) == code
    assert not child.is_running()
    console = slow.console()
    assert "megatron-r1 data generate: interrupted" in console
    assert "megatron-r1 run: interrupted" in console
    assert "Traceback" not in console
    assert slow.states() == {"first": "done", "corpus": "interrupted"}


def test_one_run_at_a_time(slow: Recipe, kill: Kill) -> None:
    process = slow.start()
    child = until(lambda: verb(process), process)
    child.suspend()  # the second run needs longer to start than this stage would to end
    refused = slow.run(code=2).stderr
    child.resume()
    assert f"another run of a recipe (process {process.pid}) is at work in {slow.output}" in refused
    kill(process)


def test_a_stage_that_was_killed_and_then_changed_begins_anew(slow: Recipe, kill: Kill) -> None:
    process = slow.start()
    until(lambda: verb(process), process)
    (slow.output / "corpus/half.jsonl").write_text("of the old settings")
    kill(process)
    slow.tree["stages"]["corpus"]["documents"] = 5
    assert slow.ran() == {"first": "unchanged", "corpus": "ran"}
    assert not (slow.output / "corpus/half.jsonl").exists()
    assert (slow.output / "superseded/corpus-1/half.jsonl").exists()
