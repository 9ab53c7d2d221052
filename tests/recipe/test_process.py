"""A verb as a child process that does not do what it is asked."""

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_r1.recipe import process
from megatron_r1.recipe.process import SAVED, StageError, run_verb

DEAF = """#!/bin/sh
[ "$2" = megatron_r1.recipe.keeper ] && exec {python} "$@"
trap '' TERM
echo $$ > {pid}
exec sleep 1000
"""
"""Stands for Python: the keeper is as it is, the verb hears no SIGTERM."""
SAVING = """#!/bin/sh
[ "$2" = megatron_r1.recipe.keeper ] && exec {python} "$@"
trap 'exit 75' TERM USR1
echo $$ > {pid}
while :; do sleep 0.05; done
"""
"""The same, with a verb that saves when it is asked to end."""


def test_a_verb_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid, python = tmp_path / "pid", tmp_path / "python"
    python.write_text(DEAF.format(python=sys.executable, pid=pid))
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(process, "END_SECONDS", 0.5)

    def watch() -> None:
        if pid.exists() and pid.read_text():
            raise StageError("a service has ended")

    read, write = os.pipe()
    with pytest.raises(StageError, match="a service has ended"):
        run_verb("rl", tmp_path / "stage.toml", write, quiet=True, watch=watch)
    os.close(write)
    verb = int(pid.read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(verb) and psutil.Process(verb).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert os.read(read, 1) == b""  # nobody holds the lock any more
    os.close(read)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_handed_on_to_a_verb_that_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals
) -> None:
    pid, python = tmp_path / "pid", tmp_path / "python"
    python.write_text(SAVING.format(python=sys.executable, pid=pid))
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(process, "POLL_SECONDS", 0.1)

    def watch() -> None:
        if pid.exists() and pid.read_text():
            os.kill(os.getpid(), sent)

    read, write = os.pipe()
    assert run_verb("rl", tmp_path / "stage.toml", write, quiet=True, watch=watch) == (SAVED, sent)
    os.kill(os.getpid(), sent)  # a second one, when the verb has ended: its code is what counts
    os.close(read)
    os.close(write)


def test_the_exit_code_is_the_verbs(tmp_path: Path) -> None:
    handlers = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1)]
    read, write = os.pipe()
    assert run_verb("rl", tmp_path / "none.toml", write, quiet=True, watch=lambda: None) == (2, 0)
    assert [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1)] == handlers
    os.close(read)
    os.close(write)
