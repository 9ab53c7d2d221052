"""The two programs of `grpo_vs_trl.py` as child processes that take turns, and their settings."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from grpo_work import Work

HERE = Path(__file__).parent
START_SECONDS = 900
MICROBATCH = 16
"""Samples of one forward and backward pass of TRL's; ours is counted in tokens, as nothing is padded."""
PHASES = ("rollout", "reward", "logprobs", "update", "sync")
"""Of a step; the names are those of our metrics."""


class Side:
    """A program that trains, one step at a time.

    Args:
        name: of it.
        command: what to run; `{address}` in it is where it waits for its turn.
        folder: for its log and socket.
        threads: OpenMP threads.
    """

    def __init__(self, name: str, command: Sequence[str], folder: Path, threads: int) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        address = str(folder / f"{name}.socket")
        Path(address).unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._listener.listen(1)
        self._listener.settimeout(1.0)
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                [word.replace("{address}", address) for word in command],
                env=os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._turns: Any = None
        self.last: dict[str, float] = {}
        """What it said of its last step, if anything, and its `seconds`."""
        self.steps: list[dict[str, float]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._turns:
            self._turns.close()
        self._listener.close()
        try:
            self._process.wait(60 if self._turns else 0)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def wait_until_ready(self) -> None:
        """Blocks until the first step could begin."""
        deadline = time.monotonic() + START_SECONDS
        while self._turns is None:
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise self._failure("did not start") from None
                continue
            with connection:
                connection.settimeout(None)
                self._turns = connection.makefile("rw", encoding="utf-8")
        self._heard()

    def step(self) -> float:
        """Do one step. Returns its seconds."""
        started = time.perf_counter()
        self._turns.write("go\n")
        self._turns.flush()
        said = self._heard()
        self.last = {**said, "seconds": time.perf_counter() - started}
        self.steps.append(self.last)
        return self.last["seconds"]

    def _heard(self) -> dict[str, float]:
        line = self._turns.readline()
        if not line:
            raise self._failure("has died")
        said: dict[str, float] = json.loads(line)
        return said

    def _failure(self, what: str) -> SystemExit:
        end = self.log.read_text(errors="replace").splitlines()[-30:]
        return SystemExit("\n".join([f"{self.name} {what}; the end of its log:", *end]))


class Ours(Side):
    """`megatron-r1 rl`. What it says of a step is in its metrics.jsonl by the time that it asks for the next."""

    def __init__(self, work: Work, folder: Path, port: int, overrides: Sequence[str]) -> None:
        self._metrics, self._samples = folder / "ours" / "metrics.jsonl", work.samples
        file = folder / "ours.toml"
        file.write_text(run_file(work, folder, port))
        options = [f"--{override}" for override in overrides]
        super().__init__("ours", [sys.executable, "-m", "megatron_r1.cli", "rl", str(file), *options], folder, 1)

    def _heard(self) -> dict[str, float]:
        super()._heard()
        rows = [json.loads(line) for line in self._metrics.read_text().splitlines()]
        steps = [row for row in rows if row["kind"] == "step"]
        if not steps:
            return {}
        phases = {name: steps[-1].get(f"seconds/{name}", 0.0) for name in PHASES}
        return {"tokens": steps[-1]["response_length"] * self._samples, **phases}


class Theirs(Side):
    """TRL."""

    def __init__(self, work: Work, folder: Path, changes: dict[str, Any]) -> None:
        settings = json.dumps(trl_settings(work, changes))
        words = [sys.executable, str(HERE / "grpo_trl.py"), json.dumps(asdict(work)), "{address}", settings]
        super().__init__("trl", words, folder, work.threads)


def trl_settings(work: Work, changes: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `GRPOConfig`: the fastest that TRL has on CPU, as far as we know (`--sweep` compares them).

    * Weights, gradients and optimizer in bfloat16, no autocast, no gradient checkpointing (TRL's defaults: float32
      weights under autocast, checkpointing on); fused AdamW and SDPA attention are its defaults.
    * No reference model; with one update a step no second forward pass for the old log-probabilities either.
    * Answers from `model.generate` for all samples of a step at once. Of TRL's other ways, vLLM as a server needs CUDA
      (`VLLMClient.init_communicator`).
    """
    micro = changes.get("per_device_train_batch_size", min(MICROBATCH, work.samples // work.updates))
    made: dict[str, Any] = {
        "output_dir": str(Path(work.prompts).with_name("trl")),
        "use_cpu": True,
        "model_init_kwargs": {"dtype": work.dtype},
        "bf16": False,  # autocast, which weights of bfloat16 do not need
        "gradient_checkpointing": False,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": work.samples // work.updates // micro,
        "steps_per_generation": work.samples // micro,
        "num_generations": work.group,
        "max_completion_length": work.answer_tokens,
        "temperature": 1.0,
        "beta": 0.0,
        "loss_type": "grpo",
        "learning_rate": work.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "max_steps": work.steps * work.updates,
        "shuffle_dataset": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }
    return made | changes


def run_file(work: Work, folder: Path, port: int) -> str:
    """Our side's settings; the names of the keys say what the `Work` has to do with them."""
    length = work.prompt_tokens + work.answer_tokens
    components = HERE / "grpo_work.py"
    return f"""
output = "{folder}/ours"
steps = {work.steps}
questions = {work.questions}
group_size = {work.group}
minibatches = {work.updates}
tokens_per_microbatch = 2048
logprob_bound = 1.0
reward_workers = 1
rewards = {{ letters = {{ type = "{components}:LetterShare" }} }}
loss = {{ type = "grpo", clip_eps = 0.2, kl_coef = 0.0 }}
optim = {{ lr = {work.lr}, weight_decay = 0.0, clip_grad = 1.0, beta2 = 0.999 }}
parallel = {{ processes = 1, threads = {work.threads} }}
evaluation = {{ questions = 1, samples = 1 }}
checkpoint = {{ every = {work.steps} }}
report = {{ console = false, tensorboard = false }}

[model]
path = "{work.model}"
dtype = "{work.dtype}"

[data.task]
type = "{components}:Prompts"
file = "{work.prompts}"
per_step = {work.questions}
address = "{folder}/ours.socket"

[heldout]
template = "{{question}}"
task = {{ type = "reasoning_gym", dataset = "chain_sum" }}

[rollout]
port = {port}
max_model_len = {length + 64}
max_tokens = {work.answer_tokens}
max_num_seqs = {work.samples}
threads = {work.threads}
"""
