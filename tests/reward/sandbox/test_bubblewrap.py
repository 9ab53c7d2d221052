import os
import stat
import sys
from pathlib import Path

import pytest

from megatron_r1.config.sandbox import Limits
from megatron_r1.errors import EngineError
from megatron_r1.reward.sandbox import bubblewrap, users, view
from megatron_r1.reward.sandbox.job import Program
from megatron_r1.reward.sandbox.local import Local, open_pool
from megatron_r1.reward.sandbox.pool import Pool

REFUSALS = {
    "bwrap: No permissions to create new namespace, likely because the kernel does not allow non-privileged user "
    "namespaces.": "sysctl kernel.unprivileged_userns_clone=1",
    "bwrap: setting up uid map: Permission denied": "docker run --security-opt",
    "bwrap: Can't mount proc on /newroot/proc: Operation not permitted": "systempaths=unconfined",
    "bwrap: Unknown option --size": "too old",
}


@pytest.mark.parametrize("said", REFUSALS)
def test_a_kernel_that_refuses_is_explained(said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bwrap"
    program.write_text(f'#!/bin/sh\necho "{said}" >&2\nexit 1\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(EngineError) as refused:
        open_pool("bubblewrap", 1)
    for part in (said, REFUSALS[said], 'sandbox = "rlimits"', "remote executor"):
        assert part in str(refused.value)


def test_no_bubblewrap_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(EngineError, match=r"(?s)no bwrap on PATH or in .*apt-get install bubblewrap.*rlimits"):
        bubblewrap.find()


def test_found_beside_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bwrap").write_text("#!/bin/sh\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert bubblewrap.find() == str(tmp_path / "bwrap")


def test_what_can_be_seen(pool: Pool) -> None:
    """Neither this project nor an environment is bound into a box, nor the packages of Python's own folder."""
    options = list(view.file_system())
    sources = [Path(options[index + 1]) for index, option in enumerate(options) if "bind" in option]
    for hidden in (
        Path(view.__file__),
        Path(sys.prefix, "pyvenv.cfg"),
        Path.home(),
        Path("/root"),
        Path("/etc/passwd"),
    ):
        assert not any(hidden.resolve().is_relative_to(source) for source in sources)


@pytest.mark.skipif(not users.needed(), reason="only for root")
def test_each_box_of_root_has_a_user_of_its_own(sandbox: Local) -> None:
    program = Program("python", "print(open('/proc/self/uid_map').read().split(), __import__('os').getresuid())")
    said = [next(sandbox.run(program, [""], Limits())).stdout for _ in range(2)]
    inside = [line.partition("]")[2] for line in said]
    assert inside[0] != inside[1]
    assert all(str(users.FIRST) in line and "(0," not in line for line in said)
