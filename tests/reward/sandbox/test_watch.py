"""Against what the processes were made to use."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from megatron_r1.reward.sandbox.inside.process import descendants
from megatron_r1.reward.sandbox.watch import usage

SOURCE = """
import os, threading, time
kept = [open('/dev/null') for _ in range(300)]
children = [os.fork() for _ in range(2)]
if 0 not in children:
    block = bytearray(b'x') * (100 << 20)
    for _ in range(3): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    print('ready', flush=True)
time.sleep(60)
"""


@pytest.fixture
def leader() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", SOURCE], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process.pid
        for pid in [*descendants(process.pid), process.pid]:
            os.kill(pid, 9)


def test_counts_everything_below(leader: int) -> None:
    used = usage(leader, 100)
    assert len(descendants(leader)) == 3  # the first child forks once more
    assert used.tasks == 4 + 3
    assert 100 < used.memory_kib >> 10 < 250
    assert used.descriptors >= 4 * (300 - 64)


def test_ends_early(leader: int) -> None:
    assert usage(leader, 2).tasks < 7


def test_a_process_that_is_over() -> None:
    assert usage(2**22 + 1, 10).tasks == 0
    assert descendants(2**22 + 1) == []
