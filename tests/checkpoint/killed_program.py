"""Saves step 1, begins to save step 2 in the background into the folder given, and kills itself."""

import os
import signal
import sys
import tempfile
from pathlib import Path

from megatron_r1.checkpoint.store import Checkpoints
from megatron_r1.config.checkpoint import CheckpointSection
from tests.checkpoint.conftest import make, train


def main() -> None:
    """Never returns."""
    with tempfile.TemporaryDirectory() as model:
        policy = make(Path(model), num_hidden_layers=2)
    section = CheckpointSection(every=1, asynchronous=True)
    checkpoints = Checkpoints(Path(sys.argv[1]), section, {"seed": 0})
    for done in (1, 2):
        train(policy, done - 1, 1)
        checkpoints.save(done, policy.trainable, {}, {"done": float(done)})
        if done == 1:
            checkpoints.finish()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
