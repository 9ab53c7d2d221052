"""What several test folders share."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two OpenMP threads on busy cores cost many times what they gain

# A shell's background job ignores Ctrl-C, and so would every command that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("unhurried", deadline=None)  # nothing here is a test of speed, and machines are busy
settings.load_profile("unhurried")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--component",
        action="append",
        default=[],
        metavar="FILE.py:NAME",
        help="run tests/contracts on this task, reward, tool or model family, not on those built in; may be repeated",
    )
    parser.addoption(
        "--model",
        metavar="FOLDER",
        help="a tiny Hugging Face model that transformers has saved, of the model family that --component names",
    )


RL_FILE = """
output = "runs/rl"
steps = 3
questions = 4
group_size = 4
minibatches = 2

[model]
path = "model"

[data.task]
type = "reasoning_gym"
dataset = "chain_sum"

[heldout.task]
type = "reasoning_gym"
dataset = "chain_sum"

[rewards.accuracy]
type = "task"

[rollout]
max_model_len = 64
max_tokens = 32

[optim]
lr = 1e-4
"""


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """A run that was asked to end is deaf from then on (`checkpoint/signals.py`), and a test after it is not."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture
def rl_file(tmp_path: Path) -> Path:
    """A small, valid run file of the `rl` verb."""
    path = tmp_path / "rl.toml"
    path.write_text(RL_FILE)
    return path
