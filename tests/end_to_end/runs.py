"""Run files of these tests, and the command as a process that can be interrupted."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import tomli_w

from tests.processes import command_line, outlive

SAVED = 75
"""Exit code of a run that has saved because it was asked to end (EX_TEMPFAIL of sysexits.h)."""
ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples/r1_tiny/model"
SUM = {
    "type": "reasoning_gym",
    "dataset": "chain_sum",
    "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
}
QUESTIONS = {"template": "r1_zero_short", "task": SUM}
QUIET = {"tensorboard": False}
TIMES = ("elapsed", "seconds", "tokens_per_second", "tflops", "memory_peak_max", "learner_idle")
TIMED = ("seconds/", "sync_seconds/", "fleet_")


def generate(folder: Path) -> dict[str, Any]:
    return {
        "output": str(folder / "corpus"),
        "task": SUM,
        "documents": 300,
        "validation_documents": 20,
        "template": "r1_zero_short",
        "quality": {"careful": 1.0},
    }


def tokenizer(folder: Path) -> dict[str, Any]:
    return {
        "input": [str(folder / "corpus/train.jsonl")],
        "output": str(folder / "tokenizer"),
        "vocab_size": 340,
        "special_tokens": ["<think>", "</think>", "<answer>", "</answer>"],
    }


def index(folder: Path) -> dict[str, Any]:
    files = {name: str(folder / f"corpus/{name}.jsonl") for name in ("train", "validation")}
    return {"output": str(folder / "index"), "tokenizer": str(folder / "tokenizer"), "inputs": files}


def pretrain(folder: Path, output: Path) -> dict[str, Any]:
    """12 steps, a checkpoint after every 4; the routing bias, the MTP layer and a schedule are at work."""
    return {
        "output": str(output),
        "tokenizer": str(folder / "tokenizer"),
        "steps": 12,
        "batch": 4,
        "microbatch": 2,
        "validation_every": 6,
        "validation_batches": 1,
        "model": {"path": str(MODEL), "load_weights": False, "dtype": "float32", "init_std": 0.05},
        "corpus": {
            "train": [str(folder / "index/train")],
            "validation": [str(folder / "index/validation")],
            "test": [str(folder / "index/validation")],
            "sequence_length": 64,
        },
        "optim": {"lr": 5e-3, "schedule": "cosine", "warmup_steps": 3},
        "checkpoint": {"every": 4},
        "report": QUIET,
    }


def rl(folder: Path, output: Path, port: int) -> dict[str, Any]:
    """3 steps of 2 updates, a checkpoint after each; after the second the reference is refreshed, and responses may be
    longer."""
    return {
        "output": str(output),
        "steps": 3,
        "questions": 4,
        "group_size": 4,
        "minibatches": 2,
        "tokens_per_microbatch": 512,
        "logprob_bound": 1e-4,
        "model": {"path": str(folder / "base/hf"), "dtype": "float32", "bias_update_rate": 1e-3},
        "data": QUESTIONS,
        "heldout": QUESTIONS,
        "rewards": {
            "accuracy": {"type": "task"},
            "format": {"type": "format"},
            "digits": {"type": "tests.end_to_end.components:Digits"},
        },
        "reward_workers": 1,
        "loss": {
            "type": "tests.end_to_end.components:Announced",
            "marker": str(output.with_suffix(".armed")),
            "kl_coef": 0.05,
        },
        "reference": {"refresh_every": 2},
        "rollout": {
            "port": port,
            "max_model_len": 128,
            "max_tokens": [{"value": 32, "until_step": 2}, {"value": 48}],
            "max_num_seqs": 16,
            "kv_cache_gib": 0.1,
            "threads": 1,
        },
        "evaluation": {"questions": 4, "samples": 1, "every": 2},
        "optim": {"lr": 2e-3, "schedule": "cosine", "warmup_steps": 2},
        "checkpoint": {"every": 1},
        "report": QUIET,
    }


def write(path: Path, tree: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tomli_w.dumps(tree))
    return path


def free_port() -> int:
    """One that nobody holds; test programs that run side by side begin to look at different ones."""
    first = 8900 + 10 * (os.getpid() % 100)
    return next(port for port in range(first, first + 100) if is_free(port))


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex(("127.0.0.1", port)) != 0


ALL = "import sys; from megatron_r1.cli import main; sys.exit(any(main(line.split()) for line in sys.argv[1:]))"


def prepare(folder: Path) -> None:
    """Make `corpus`, `index`, `tokenizer` and `base` (12 undisturbed steps of pretraining) by the verbs."""
    steps = {
        "data generate": generate(folder),
        "tokenizer train": tokenizer(folder),
        "data index": index(folder),
        "pretrain": pretrain(folder, folder / "base"),
    }
    files = {verb: write(folder / f"{verb.replace(' ', '_')}.toml", tree) for verb, tree in steps.items()}
    lines = [f"{verb} {path}" for verb, path in files.items()]
    done = subprocess.run([sys.executable, "-c", ALL, *lines], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Command:
    """`megatron-r1 <verb> <run file>` in a session of its own, as a terminal would start it.

    A context manager that fails if the command leaves a process behind.
    """

    def __init__(self, verb: str, run_file: Path, *overrides: str) -> None:
        self.errors = run_file.with_name(f"{verb}.stderr")
        self.process = self.launch(verb, str(run_file), *overrides)
        self.family: set[psutil.Process] = set()

    def launch(self, *arguments: str) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        with self.errors.open("wb") as errors:
            return subprocess.Popen(
                [sys.executable, "-m", "megatron_r1.cli", *arguments],
                cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.process.poll() is None:
            self.look()
            self.process.kill()
            self.process.wait()
        left = outlive(self.family, 20)
        names = [" ".join(command_line(process)) for process in left]
        for process in left:
            process.kill()
        assert kind or not names, f"left behind: {names}"

    def look(self) -> set[psutil.Process]:
        """Remember who belongs to the command, for the question who is left."""
        self.family |= set(psutil.Process(self.process.pid).children(recursive=True))
        return self.family

    def until(self, happened: Callable[[], bool], seconds: float = 120, pause: float = 0.02) -> "Command":
        """Wait for something to happen while the command runs."""
        deadline = time.monotonic() + seconds
        while not happened():
            assert self.process.poll() is None, f"ended too early with {self.process.returncode}: {self.message()}"
            assert time.monotonic() < deadline, f"did not happen within {seconds} s: {self.message()}"
            time.sleep(pause)
        return self

    def engine(self) -> list[psutil.Process]:
        """vLLM's processes, without the supervisor."""
        members = [(process, " ".join(command_line(process))) for process in self.look()]
        return [p for p, line in members if ("vllm" in line or "VLLM" in line) and "supervisor" not in line]

    def send(self, sent: signal.Signals) -> "Command":
        """A signal to the whole process group: what a terminal does on Ctrl-C, or `kill -9 -<group>`."""
        self.look()
        os.killpg(self.process.pid, sent)
        return self

    def end(self, seconds: float = 120) -> int:
        """Wait for the command; its exit code."""
        return self.process.wait(seconds)

    def message(self) -> str:
        return self.errors.read_text(errors="replace")


def checkpoint(output: Path, done: int) -> Callable[[], bool]:
    """Does the whole checkpoint after `done` steps stand?"""
    return (output / f"checkpoints/step_{done:08d}").exists


def rows(output: Path, kind: str = "step") -> list[dict[str, Any]]:
    """The metrics of one kind, without what tells time."""
    parsed = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if key not in TIMES and not key.startswith(TIMED)}
        for row in parsed
        if row["kind"] == kind
    ]


def summary(output: Path) -> dict[str, Any]:
    """The run's figures, without what tells time or place."""
    figures: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return {key: value for key, value in figures.items() if key not in {"model", "seconds_total"}}


def weights(output: Path) -> bytes:
    return (output / "hf/model.safetensors").read_bytes()


def interrupted_cleanly(command: Command, code: int) -> None:
    """The exit code, and one line about it."""
    assert command.end(60) == code, command.message()
    assert "Traceback" not in command.message()
    said = [line for line in command.message().splitlines() if line.startswith("megatron-r1 ")]
    assert len(said) == 1
    assert "interrupted" in said[0]
