"""The version of NCCL is that of the library which is loaded, by whatever way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.doctor.environments import ROOT

SOURCE = "int ncclGetVersion(int *version) { *version = %d; return 0; }"


@pytest.mark.parametrize(("code", "version"), [(23203, "(2, 32, 3)"), (22907, "(2, 29, 7)")])
def test_of_a_preloaded_library(code: int, version: str, tmp_path: Path) -> None:
    (tmp_path / "nccl.c").write_text(SOURCE % code)
    library = tmp_path / "elsewhere.so"
    compiler = ["cc", "-shared", "-fPIC", "-Wl,-soname,libnccl.so.2", "-o", str(library), str(tmp_path / "nccl.c")]
    subprocess.run(compiler, check=True)
    environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "from megatron_r1.doctor import nccl; print(nccl.version())"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == version
