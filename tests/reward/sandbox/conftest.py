"""Boxes that the sandbox's tests share."""

import time
from collections.abc import Iterator

import psutil
import pytest

from megatron_r1.errors import EngineError
from megatron_r1.reward.sandbox.local import Local, open_pool
from megatron_r1.reward.sandbox.pool import Pool

WARM = 2
_OTHERS: set[psutil.Process] = set()
"""What other tests have left running below this process."""


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Boxes by bubblewrap."""
    _OTHERS.update(psutil.Process().children(recursive=True))
    try:
        opened = open_pool("bubblewrap", WARM)
    except EngineError as error:
        pytest.skip(str(error))
    settle()
    yield opened
    opened.close()


def started() -> set[psutil.Process]:
    """All processes below this one that the sandbox's tests started."""
    return set(psutil.Process().children(recursive=True)) - _OTHERS


def settle() -> None:
    """Wait until there is nothing new below this process but the boxes that wait: bwrap and one more process each."""
    for _ in range(200):
        below = started()
        if len(below) == 2 * WARM:
            return
        time.sleep(0.05)
    pytest.fail(f"running: {below}")


@pytest.fixture(scope="session")
def sandbox(pool: Pool) -> Local:
    return Local(pool)
