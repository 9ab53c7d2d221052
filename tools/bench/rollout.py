"""Tokens per second of a rollout: `Fleet.sample`, over HTTP to a real server, against vLLM's own `LLM.generate`.

    python tools/bench/rollout.py examples/r1_tiny/r1_zero.toml --rollout.port=9000
    python tools/bench/rollout.py examples/r1_tiny/r1_zero.toml --rollout.port=9000 --rollout.engines=2

The same engines are fed in both ways, `dispatch = "batch"` and `"continuous"`. With two engines the baseline stays one
bare engine: on a machine whose cores it fills alone, nothing is to be gained.

Both hold the same weights, answer the same prompts with the same number of samples, lengths, temperature, dtype and
threads, and take turns. The bare engine lives in a process of its own, as the server does.

Beside tokens per second there are tokens per second of processor time: of the server's processes and of this program on
our side. Other programs on the machine change these far less, and they show what a rollout costs those.

vLLM draws with one call for the whole batch unless a request has a seed of its own; the trainer asks for seeds
(a run repeats bit for bit) and for log-probabilities (the policy gradient needs them). So there are two
baselines: one that asks for the same, and one that asks for tokens alone.
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import psutil
import torch
from paired import Comparison, measure, parser, report

from megatron_r1.config.environment import inherited
from megatron_r1.config.load import load
from megatron_r1.config.runs import RLConfig
from megatron_r1.config.schedule import value_at_step
from megatron_r1.data.questions import Questions
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import EngineError
from megatron_r1.rollout.fleet import Fleet, stop_token_ids
from megatron_r1.rollout.server import CPU_STEP_TOKENS, variables
from megatron_r1.seeds import stream_seed

SEED = 1
CLOSE_SECONDS = 30.0


class BareEngine:
    """vLLM's `LLM` in a process of its own."""

    def __init__(self, config: RLConfig, log: Path) -> None:
        on_cpu = not torch.cuda.is_available()
        context = multiprocessing.get_context("spawn")
        self._log = log
        self._connection, theirs = context.Pipe()
        # No daemon, which may have no children: on a GPU vLLM's core is one.
        self._process = context.Process(target=serve, args=(theirs, engine_arguments(config, on_cpu), log))
        # Read when the process imports torch and vLLM, so before its first line.
        with patch.dict(os.environ, inherited() | variables(config.rollout, config.model.path, on_cpu), clear=True):
            self._process.start()
        theirs.close()

    def wait_until_ready(self) -> None:
        """Blocks while the engine starts."""
        self._receive()

    @property
    def processes(self) -> list[psutil.Process]:
        """All of them."""
        process = psutil.Process(self._process.pid)
        return [process, *process.children(recursive=True)]

    def sample(self, prompts: list[list[int]], options: list[dict[str, Any]]) -> tuple[int, float]:
        """With one set of `SamplingParams` a prompt. Returns tokens and seconds."""
        self._connection.send((prompts, options))
        tokens, seconds = self._receive()
        return tokens, seconds

    def tokens_per_second(self, prompts: list[list[int]], options: list[dict[str, Any]]) -> float:
        """Of `sample`."""
        tokens, seconds = self.sample(prompts, options)
        return tokens / seconds

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError as error:
            end = self._log.read_text(errors="replace").splitlines()[-30:]
            raise EngineError("\n".join(["the bare engine died; the end of its log:", *end])) from error

    def close(self) -> None:
        """End the process, and those that it has started."""
        processes = self.processes if self._process.is_alive() else []
        self._connection.close()
        self._process.join(CLOSE_SECONDS)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()


@dataclass
class Side:
    """Something that samples, and what it takes."""

    sample: Callable[[], tuple[int, float]]
    """Tokens and seconds."""
    processes: Callable[[], Sequence[psutil.Process]]
    """Those that do it."""
    of_processor: float = 0.0
    """Tokens per second of processor time in the last run."""

    def of_time(self) -> float:
        """Run; tokens per second."""
        processes = self.processes()
        before = sum(map(processor_seconds, processes))
        tokens, seconds = self.sample()
        self.of_processor = tokens / (sum(map(processor_seconds, processes)) - before)
        return tokens / seconds


def processor_seconds(process: psutil.Process) -> float:
    """That a process has used."""
    times = process.cpu_times()
    return float(times.user + times.system)


def engine_arguments(config: RLConfig, on_cpu: bool) -> dict[str, Any]:
    """The keywords of `LLM` that mean the same as the fleet's settings."""
    section = config.rollout
    arguments: dict[str, Any] = {
        "model": str(config.model.path.resolve()),
        "dtype": config.model.dtype,
        "max_model_len": section.max_model_len,
        "max_num_seqs": section.max_num_seqs,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
    }
    share = [value for name, _, value in map(_parted, section.arguments) if name == "--gpu-memory-utilization"]
    if share:
        arguments["gpu_memory_utilization"] = float(share[-1])
    if on_cpu:
        arguments |= {
            "enforce_eager": True,
            "kv_cache_memory_bytes": int(section.kv_cache_gib * 2**30),
            "compilation_config": {"custom_ops": ["all", "-rotary_embedding"]},  # right results; see rollout/server.py
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(section.max_model_len, CPU_STEP_TOKENS),
        }
    return arguments


def _parted(argument: str) -> tuple[str, str, str]:
    return argument.partition("=")


def serve(connection: Connection, arguments: dict[str, Any], log: Path) -> None:
    """The bare engine's process: batches in, token counts and seconds out."""
    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    from vllm import LLM, SamplingParams

    llm = LLM(**arguments)
    connection.send("ready")
    while True:
        try:
            prompts, options = connection.recv()
        except EOFError:
            return
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        params = [SamplingParams(**option) for option in options]
        llm.reset_prefix_cache()  # as a trainer must after every change of the weights
        started = time.perf_counter()
        outputs = llm.generate(inputs, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        connection.send((sum(len(one.token_ids) for output in outputs for one in output.outputs), seconds))


def all_but(bare: BareEngine) -> list[psutil.Process]:
    """This program and all that it has started, the bare engine excepted."""
    mine, theirs = psutil.Process(), bare.processes
    return [mine, *(process for process in mine.children(recursive=True) if process not in theirs)]


def both(title: str, name: str, ours: Side, baseline: Side) -> list[Comparison]:
    """By time, and by processor time of the very runs: `measure` has both run for the first, then asks the second."""
    return [
        Comparison(title, "tokens/s", name, ours.of_time, baseline.of_time, 0.95),
        Comparison(
            f"{title}: processors", "tokens/CPU s", name, lambda: ours.of_processor, lambda: baseline.of_processor
        ),
    ]


def main() -> None:
    options = parser(__doc__, rounds=5)
    options.add_argument("--questions", type=int, default=None, help="prompts of a batch (default: the run file's)")
    chosen, overrides = options.parse_known_args()
    config = load(chosen.run, overrides, RLConfig)
    tokenizer = Tokenizer.load(config.tokenizer or config.model.path)
    questions = Questions(config.data, config.seed).take(0, chosen.questions or config.questions)
    prompts = [tokenizer.encode_prompt(question.prompt) for question in questions]
    n = config.group_size
    plain = {
        "temperature": config.rollout.temperature,
        "top_p": 1.0,
        "max_tokens": value_at_step(config.rollout.max_tokens, 0),
        "stop_token_ids": list(stop_token_ids(config.model.path)),
        "detokenize": False,
    }
    seeded = [
        {**plain, "logprobs": 0, "flat_logprobs": True, "seed": stream_seed(SEED, index, sample)}
        for index in range(len(prompts))
        for sample in range(n)
    ]
    repeated = [prompt for prompt in prompts for _ in range(n)]

    with (
        tempfile.TemporaryDirectory(prefix="megatron-r1-bench-") as folder,
        closing(BareEngine(config, Path(folder) / "bare.log")) as bare,
    ):
        fleet = Fleet(config.rollout, config.model.path, Path(folder), config.model.dtype, tokenizer.decode)

        def ours(dispatch: Literal["batch", "continuous"]) -> tuple[int, float]:
            fleet.feed(dispatch)
            started = time.perf_counter()
            groups = fleet.sample(prompts, n=n, seed=SEED)
            seconds = time.perf_counter() - started
            return sum(len(sample.tokens) for group in groups for sample in group), seconds

        same = Side(partial(bare.sample, repeated, seeded), lambda: bare.processes)
        alone = Side(partial(bare.sample, prompts, [{**plain, "n": n}] * len(prompts)), lambda: bare.processes)
        baselines = {"LLM.generate, seeds and logprobs as ours": same, f"LLM.generate, n={n}, tokens alone": alone}
        comparisons = [
            comparison
            for dispatch in ("batch", "continuous")
            for name, baseline in baselines.items()
            for comparison in both(
                f"Fleet.sample, {dispatch}", name, Side(partial(ours, dispatch), partial(all_but, bare)), baseline
            )
        ]
        with fleet:
            bare.wait_until_ready()
            measure(comparisons, chosen.rounds)
    settings = {
        "engines": config.rollout.engines,
        "samples": f"{len(prompts)} prompts x {n}",
        "max_tokens": value_at_step(config.rollout.max_tokens, 0),
        "dtype": config.model.dtype,
        "threads": config.rollout.threads,
    }
    report("rollout", comparisons, chosen.json, **settings)


if __name__ == "__main__":
    main()
