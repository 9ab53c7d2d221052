"""What the runs of this folder start from: corpus, tokenizer and a base model that was trained for seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end import runs

ALL = "import sys; from megatron_r1.cli import main; sys.exit(any(main(line.split()) for line in sys.argv[1:]))"


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `corpus`, `index`, `tokenizer` and `base` (12 undisturbed steps), made by the verbs."""
    folder = tmp_path_factory.mktemp("prepared")
    steps = {
        "data generate": runs.generate(folder),
        "tokenizer train": runs.tokenizer(folder),
        "data index": runs.index(folder),
        "pretrain": runs.pretrain(folder, folder / "base"),
    }
    files = {verb: runs.write(folder / f"{verb.replace(' ', '_')}.toml", tree) for verb, tree in steps.items()}
    lines = [f"{verb} {path}" for verb, path in files.items()]
    done = subprocess.run(
        [sys.executable, "-c", ALL, *lines], cwd=runs.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder
