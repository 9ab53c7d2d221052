"""No process outlives the run: killed parent, killed supervisor, stubborn child, real vLLM."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.processes import outlive
from tests.rollout.tiny_model import free_port

TREE = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.{disposition})
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
time.sleep(600)
"""
RUN = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-m", "megatron_r1.rollout.supervisor", str(os.getpid()), *sys.argv[1:]],
                 start_new_session=True)
time.sleep(600)
"""
ENGINE_RUN = """
import sys
from pathlib import Path
from megatron_r1.config.sections import RolloutSection
from megatron_r1.rollout.fleet import Fleet
section = RolloutSection(port=int(sys.argv[1]), max_model_len=64, max_tokens=8, kv_cache_gib=0.1, threads=1)
Fleet(section, Path(sys.argv[2]), Path(sys.argv[3]), "float32", str)
"""


def descendants(run: subprocess.Popen[bytes], count: int, seconds: float) -> list[psutil.Process]:
    """Wait until the run has `count` descendants."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = psutil.Process(run.pid).children(recursive=True)
        if len(found) >= count:
            return found
        time.sleep(0.05)
    raise AssertionError(f"the run has {len(found)} descendants after {seconds} s, not {count}")


def assert_gone(processes: list[psutil.Process], seconds: float) -> None:
    assert not outlive(processes, seconds)


@pytest.mark.parametrize("disposition", ["SIG_DFL", "SIG_IGN"])
def test_killed_run_leaves_nothing(disposition: str) -> None:
    tree = TREE.format(disposition=disposition)
    run = subprocess.Popen([sys.executable, "-c", RUN, sys.executable, "-c", tree])
    processes = descendants(run, 3, seconds=120)
    run.kill()
    run.wait()
    assert_gone(processes, seconds=120)


def test_exit_of_the_command_ends_its_children() -> None:
    tree = TREE.format(disposition="SIG_DFL")
    run = subprocess.Popen([sys.executable, "-c", RUN, sys.executable, "-c", tree])
    supervisor, root, child = descendants(run, 3, seconds=120)
    root.kill()
    assert_gone([root, child], seconds=120)
    run.kill()
    run.wait()
    assert_gone([supervisor], seconds=120)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_run_leaves_no_vllm(models: tuple[Path, Path], tmp_path: Path, how: signal.Signals) -> None:
    """Supervisor, HTTP server, engine core and Python's resource tracker; SIGTERM here without a handler of ours."""
    run = subprocess.Popen([sys.executable, "-c", ENGINE_RUN, str(free_port()), str(models[0]), str(tmp_path)])
    processes = descendants(run, 4, seconds=120)
    assert any(os.getpgid(process.pid) != os.getpgid(run.pid) for process in processes)
    run.send_signal(how)
    run.wait()
    assert_gone(processes, seconds=120)
