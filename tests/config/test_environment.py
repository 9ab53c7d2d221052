"""What servers inherit of a process that torchrun has started; the rest is in `tests/rollout/test_server.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path

CODE = """
import json, os
from megatron_r1.config.environment import inherited
print(json.dumps([dict(os.environ), inherited()]))
"""


def test_nothing_of_torchruns(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(CODE)
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    given = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        [*command, str(tmp_path / "program.py")],
        env=given,
        capture_output=True,
        text=True,
        check=True,
    )
    here, below = json.loads(done.stdout.splitlines()[-1])
    added = here.keys() - given.keys()
    assert {"RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"} <= added
    assert below.keys() & added == {"TORCH_NCCL_ASYNC_ERROR_HANDLING"}  # torch's default
    assert below["PATH"] == os.environ["PATH"]
