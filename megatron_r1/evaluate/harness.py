"""EleutherAI's lm-evaluation-harness as a child process: its command line, its console, the file that it leaves."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_r1.config.lm_eval import LmEvalConfig
from megatron_r1.errors import ConfigError, DataError, UserError
from megatron_r1.rollout.answers import digest
from megatron_r1.rollout.text_server import served_name

HARNESS = "lm_eval"
"""The package."""
INSTALL = "requirements/install.sh .venv requirements/lm_eval.lock"
FOLDER = "lm_eval"
"""Below `output`; what the harness writes."""
POLL_SECONDS = 1.0
UNKNOWN = "Tasks not found: "
"""What its `validate` says before the names."""


class HarnessError(UserError, RuntimeError):
    """The harness ended without results."""


def check_installed() -> None:
    """Raise ConfigError if the harness is not there."""
    if find_spec(HARNESS) is None:
        raise ConfigError(f"lm-eval needs EleutherAI's lm-evaluation-harness, which is not installed: {INSTALL}")


def check_tasks(config: LmEvalConfig) -> None:
    """Ask the harness whether it knows the tasks, which takes seconds; a model may take minutes to load.

    Raises:
        ConfigError: it does not know one.
        HarnessError: it does not start.
    """
    command = [sys.executable, "-m", HARNESS, "validate", f"--tasks={','.join(config.tasks)}", *_own_tasks(config)]
    done = subprocess.run(command, env=_environment(), stdout=subprocess.PIPE, text=True, check=False)
    _, unknown, names = done.stdout.partition(UNKNOWN)
    if unknown:
        raise ConfigError(
            f"tasks: the harness has no {names.strip()}; `python -m {HARNESS} ls tasks` lists what it has, and "
            "`include_path` names a folder of your own"
        )
    if done.returncode:
        raise HarnessError(f"`{' '.join(command)}` ended with code {done.returncode}; it says why above")


def measure(config: LmEvalConfig, url: str, watch: Callable[[], None]) -> dict[str, Any]:
    """Run the harness against a server, its console passed through on standard error.

    Args:
        config: the run file.
        url: of the server.
        watch: called about once a second; what it raises ends the harness.

    Returns:
        What it has written to `<output>/lm_eval/<model>/results_<time>.json`.

    Raises:
        HarnessError: it failed, or wrote no results.
    """
    folder = config.output / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    earlier = set(folder.glob("*/results_*.json"))
    code = _call([sys.executable, "-m", HARNESS, *arguments(config, url)], watch)
    if code:
        raise HarnessError(f"the harness ended with code {code}; it says why above")
    written = sorted(set(folder.glob("*/results_*.json")) - earlier)
    if not written:
        raise HarnessError(f"the harness ended without results below {folder}; it says why above")
    return read_results(written[-1])


def read_results(path: Path) -> dict[str, Any]:
    """The harness's own file.

    Raises:
        DataError: it is not JSON, or holds no results.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} does not hold results of the harness: {error}") from error
    if not isinstance(results, dict) or not isinstance(results.get("results"), dict):
        raise DataError(f"{path} holds no `results`, so the harness did not write it, or not this version of it")
    return results


def arguments(config: LmEvalConfig, url: str) -> list[str]:
    """The harness's command line; values that are tables go as JSON, so nothing in them has to be quoted."""
    command = ["run", "--model=local-completions", f"--model_args={json.dumps(_model(config, url))}"]
    command += [f"--tasks={','.join(config.tasks)}", *_own_tasks(config)]
    command += [f"--output_path={config.output / FOLDER}", "--log_samples"]
    command += [f"--use_cache={config.output / FOLDER}/responses-{_answered_by(config)}", f"--seed={config.seed}"]
    if config.num_fewshot is not None:
        command += [f"--num_fewshot={config.num_fewshot}"]
    if config.limit is not None:
        command += [f"--limit={config.limit}"]
    if config.system_instruction is not None:
        command += [f"--system_instruction={config.system_instruction}"]
    if config.generation:
        command += [f"--gen_kwargs={json.dumps(config.generation)}"]
    return [*command, "--apply_chat_template"] if config.apply_chat_template else command


def _model(config: LmEvalConfig, url: str) -> dict[str, Any]:
    """How the harness asks the server: with token ids, so that both agree on where a context ends."""
    return {
        "model": served_name(config.model),
        "base_url": f"{url}/v1/completions",
        "tokenizer": str((config.tokenizer or config.model.path).resolve()),
        "tokenizer_backend": "huggingface",
        "tokenized_requests": True,
        "add_bos_token": not config.apply_chat_template if config.add_bos_token is None else config.add_bos_token,
        "max_length": config.rollout.max_model_len,
        "max_gen_toks": config.rollout.max_tokens,
        "num_concurrent": config.concurrency,
        "timeout": config.rollout.request_timeout,
        "seed": config.seed,
    }


def _own_tasks(config: LmEvalConfig) -> list[str]:
    return [f"--include_path={config.include_path}"] if config.include_path else []


def _answered_by(config: LmEvalConfig) -> str:
    """A key for all that responses depend on besides the requests, by which the harness itself keeps them."""
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(config.model.path.iterdir())]
    asked = _model(config, url="") | {"num_concurrent": 0, "timeout": 0}
    return digest(str(config.model.path.resolve()), config.model.dtype, stamps, asked)


def _call(command: list[str], watch: Callable[[], None]) -> int:
    """Run a command in a process group of its own, which ends with this call however that ends."""
    child = subprocess.Popen(
        command, env=_environment(), stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True
    )
    try:
        while True:
            try:
                return child.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                watch()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _environment() -> dict[str, str]:
    """One OpenMP thread unless told otherwise, and no proxy between the harness and the server."""
    unproxied = ",".join(filter(None, [os.environ.get("no_proxy", os.environ.get("NO_PROXY", "")), "127.0.0.1"]))
    return {"OMP_NUM_THREADS": "1"} | os.environ | {"no_proxy": unproxied, "NO_PROXY": unproxied}
