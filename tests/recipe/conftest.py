"""A recipe of quick, real verbs, and the command as a process."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w

from tests.processes import outlive

ROOT = Path(__file__).parents[2]
SHARED = "one two three four five six seven eight nine ten"


class Recipe:
    """A folder with `recipe.toml`: three stages of `data decontaminate`, each reading what the one before has kept."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "out"
        self.rows([*(f"row {name} has words of its own" for name in "abcdefgh"), f"here {SHARED} there"])
        (folder / "exam.jsonl").write_text(json.dumps({"text": f"exam {SHARED} end"}) + "\n")
        self.tree: dict[str, Any] = {
            "output": "out",
            "title": "Three",
            "common": {"exam": {"text": ["text"], "evaluation": {"exam": {"data": {"source": "exam.jsonl"}}}}},
            "stages": {
                "first": {"verb": "data decontaminate", "use": ["exam"], "data": {"source": "rows.jsonl"}},
                "second": {"verb": "data decontaminate", "use": ["exam"], "data": {"source": "@first/kept.jsonl"}},
                "third": {"verb": "data decontaminate", "use": ["exam"], "data": {"source": "@second/kept.jsonl"}},
            },
        }
        self.tree["common"]["exam"]["evaluation"]["exam"]["text"] = ["text"]

    def rows(self, texts: list[str]) -> None:
        (self.folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "megatron_r1.cli", *arguments]

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": f"{self.folder}{os.pathsep}{ROOT}", "COLUMNS": "150"}

    def write(self) -> Path:
        path = self.folder / "recipe.toml"
        path.write_text(tomli_w.dumps(self.tree))
        return path

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*arguments), cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        assert "Traceback" not in done.stderr
        return done

    def run(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        self.write()
        done = self.call("run", "recipe.toml", *arguments)
        assert done.returncode == code, done.stderr
        return done

    def ran(self, *arguments: str) -> dict[str, str]:
        """Run; the state of each stage."""
        stages = json.loads(self.run("--json", *arguments).stdout)["stages"]
        return {name: stage["state"] for name, stage in stages.items()}

    def states(self, *more: str) -> dict[str, str]:
        """What `status` says of each stage."""
        done = self.call("status", "out", "--json", *more)
        assert done.returncode == 0, done.stderr
        return {row["stage"]: row["state"] for row in json.loads(done.stdout)["stages"]}

    def start(self, *arguments: str) -> "subprocess.Popen[bytes]":
        """Run in the background, in a session of its own; the console goes to `console.txt`."""
        self.write()
        with (self.folder / "console.txt").open("wb") as console:
            return subprocess.Popen(
                self.command("run", "recipe.toml", *arguments),
                cwd=self.folder, env=self.environment, stdout=console, stderr=console, start_new_session=True,
            )  # fmt: skip

    def console(self) -> str:
        return (self.folder / "console.txt").read_text()

    def read(self, name: str) -> Any:
        return json.loads((self.output / name).read_text())

    def as_if_killed(self, stage: str) -> None:
        """Leave of a finished stage what a kill at its last moment would have left."""
        record = self.read(f"{stage}/stage.json")
        record["attempts"][-1]["state"] = "running"
        (self.output / stage / "stage.json").write_text(json.dumps(record))
        (self.output / stage / "lineage.json").unlink()


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe(tmp_path)


@pytest.fixture
def kill() -> Iterator[Callable[["subprocess.Popen[bytes]"], list[psutil.Process]]]:
    """Kill a run and nothing else, with SIGKILL; returns who its processes were. Those that stay fail the test."""
    seen: list[psutil.Process] = []

    def killed(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
        seen.extend(psutil.Process(process.pid).children(recursive=True))
        process.send_signal(signal.SIGKILL)
        process.wait()
        return seen

    yield killed
    left = outlive(seen, 40)
    for process in left:
        process.kill()
    assert not left


def until(happened: Callable[[], Any], process: "subprocess.Popen[bytes]", seconds: float = 90) -> Any:
    """Wait for something while a run is at work; returns what it is."""
    deadline = time.monotonic() + seconds
    while not (seen := happened()):
        assert process.poll() is None, f"ended too early with {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return seen
