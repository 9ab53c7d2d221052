"""One vLLM server as a child process: its command line and environment, its start, its log, its end.

The process tree is run -> `supervisor.py` -> vLLM's HTTP server -> vLLM's engine core and workers; the supervisor's
process group holds everything below the run, and ends with it.
"""

import contextlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

import megatron_r1
from megatron_r1.config.engine_arguments import ranks
from megatron_r1.config.environment import inherited
from megatron_r1.config.lm_eval import TextServerSection
from megatron_r1.config.reward_model_server import RewardModelServerSection
from megatron_r1.config.sections import RolloutSection
from megatron_r1.errors import ConfigError, DataError, EngineError
from megatron_r1.rollout.engine import BACKEND
from megatron_r1.rollout.token_gate import TOKEN_VARIABLE

HOST = "127.0.0.1"
LOG_LINES = 30
"""Of the server's log in an error message."""
ERROR_LINE = re.compile(r"(?:^|\] )([\w.]+(?:Error|Exception): .+)")
"""The last line of a traceback, with or without vLLM's log prefix."""
CPU_MLA_LATENT = (512, 64)
"""(kv_lora_rank, qk_rope_head_dim): the only size that vLLM's MLA kernel for CPU takes."""
CPU_STEP_TOKENS = 4096
"""Tokens of one scheduler step on CPU, if the longest sequence is not longer."""
POLL_SECONDS = 0.05
CLOSE_SECONDS = 5.0
"""In which a server that was killed gives up its port."""
ServedSection = RolloutSection | RewardModelServerSection | TextServerSection
"""All have the keys that any server of ours reads: max_num_seqs, kv_cache_gib, threads, arguments."""
SERVER_MODULE = "vllm.entrypoints.openai.api_server"
HEADLESS_MODULE = "megatron_r1.rollout.headless"
SUPERVISOR_MODULE = "megatron_r1.rollout.supervisor"
RECORDING_ON_CPU = "megatron_r1.rollout.recording_cpu"
"""Stands in for `SERVER_MODULE` where vLLM cannot record experts by itself."""
OWN_EXECUTOR_ARGUMENTS = (
    *("--tensor-parallel", "-tp", "--pipeline-parallel", "-pp", "--data-parallel-size", "-dp"),
    "--distributed-executor",
)


class EngineLostError(EngineError):
    """An engine that is gone, hangs, or answers what no working engine does; a new start may mend it."""


class WeightsNeededError(EngineError):
    """Engines have come back without weights, and only a new push brings them: the transport has kept none."""


class RemoteServer:
    """A vLLM server that others have started, and end.

    Args:
        url: such as `http://node7:8700`.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def alive(self) -> bool:
        """Nobody can tell but by asking it."""
        return True

    def failure(self, what: str) -> EngineError:
        """An error that says what happened to this server."""
        return EngineError(f"vLLM at {self.url} {what}; its log is where it was started")

    def terminate(self) -> None:
        """It is not ours to end."""

    def close(self) -> None:
        """It is not ours to end."""


class Server:
    """A vLLM server on loopback.

    Args:
        command: what is run, under the supervisor.
        environment: variables beside the run's own; those that its learner has set for itself are left out.
        port: where the command listens; 0 = nowhere, as a part of an engine that spans nodes.
        log: file that its output is appended to.
        key: of the run file, which sets the port.

    Raises:
        EngineError: the port is in use.
    """

    def __init__(self, command: list[str], environment: dict[str, str], port: int, log: Path, key: str) -> None:
        self.port = port
        self.log = log
        _check_free(port, key)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._log_start = output.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", SUPERVISOR_MODULE, str(os.getpid()), *command],
                env=inherited() | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def alive(self) -> bool:
        return self._process.poll() is None

    def failure(self, what: str) -> EngineError:
        """An error that says what happened to this server, and shows the end of its log and the first error in it."""
        with self.log.open("rb") as file:
            file.seek(self._log_start)
            lines = file.read().decode(errors="replace").rstrip().splitlines()
        errors = (match[1] for line in lines if (match := ERROR_LINE.search(line)))
        who = f"vLLM at {self.url}" if self.port else "a part of a vLLM engine"
        message = [f"{who} {what}; the end of its log {self.log}:", *lines[-LOG_LINES:]]
        return EngineError("\n".join([*message, f"The first error in this log: {next(errors, 'none')}"]))

    def terminate(self) -> None:
        """Ask the server to end, without waiting for it."""
        if self.alive():
            self._process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """End the whole process group: asked first, forced if the supervisor itself is gone or hangs."""
        if self.alive():
            self.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        ended = time.monotonic()
        while _taken(self.port) and time.monotonic() - ended < CLOSE_SECONDS:
            time.sleep(POLL_SECONDS)


def engine_server(section: RolloutSection, index: int, model: Path, dtype: str, log: Path, token: str) -> Server:
    """Engine `index` of a fleet, which listens at `section.port + index` to those who show the token.

    Raises:
        EngineError: the port is in use.
        DataError: the model folder has no readable config.json.
        ConfigError: engines cannot sleep on a CPU.
    """
    on_cpu, port = not torch.cuda.is_available(), section.port + index
    if section.sleep and on_cpu:
        raise ConfigError("rollout.sleep gives a GPU's memory back, but there is no GPU here: leave it out")
    command = arguments(section, model, dtype, port, on_cpu)
    key = "rollout.port (engine i listens at port + i)"
    environment = variables(section, model, on_cpu) | devices(section, index) | {TOKEN_VARIABLE: token}
    if section.transport == "ipc":
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = (
            "1"  # handles of CUDA IPC are pickled, for those with the token
        )
    return Server(command, environment, port, log, key)


def devices(section: RolloutSection, index: int) -> dict[str, str]:
    """The variable that leaves engine `index` its GPUs of this machine; nothing where it may see all of them."""
    if section.first_gpu is None:
        return {}
    count = math.prod(ranks(section.arguments))
    first = section.first_gpu + index * count
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(first, first + count)))}


def arguments(section: RolloutSection, model: Path, dtype: str, port: int, on_cpu: bool) -> list[str]:
    """An engine's command line; the user's own arguments come last, so they win."""
    recording = RECORDING_ON_CPU if section.returns_experts and on_cpu else None
    command = base_arguments(section, model, dtype, port, recording or SERVER_MODULE)
    command += [f"--max-model-len={section.max_model_len}"]
    command += ["--skip-tokenizer-init", "--logprobs-mode=processed_logprobs", "--generation-config=vllm"]
    command += ["--middleware=megatron_r1.rollout.batch_route.BatchRoute"]
    command += ["--middleware=megatron_r1.rollout.token_gate.TokenGate"]  # the last one stands outermost
    command += ["--scheduler-cls=megatron_r1.rollout.held_outputs.scheduler"]
    receiver = f"{recording}.RecordingReceiver" if recording else "megatron_r1.rollout.receiver.Receiver"
    command += [f"--worker-extension-cls={receiver}"]
    command += ["--enable-return-routed-experts"] if section.returns_experts else []
    command += [f'--weight-transfer-config={{"backend": "{BACKEND}"}}']
    if on_cpu:
        command += cpu_arguments(section, section.max_model_len)
    command += ["--enable-sleep-mode"] if section.sleep else []
    return command + section.arguments


def base_arguments(
    section: ServedSection, model: Path, dtype: str, port: int, program: str = SERVER_MODULE
) -> list[str]:
    """What the command line of any vLLM server of ours begins with; `program`: the module that is run.

    Raises:
        DataError: the model is a Megatron checkpoint.
    """
    if (model / ".metadata").exists():
        raise DataError(
            f"{model} is a Megatron checkpoint, which engines cannot load: `megatron-r1 export {model} FOLDER` makes a "
            "Hugging Face folder of it"
        )
    command = [sys.executable, "-m", program]
    command += [f"--model={model.resolve()}", f"--host={HOST}", f"--port={port}", f"--dtype={dtype}"]
    command += [f"--max-num-seqs={section.max_num_seqs}"]
    return [*command, "--disable-log-stats", "--disable-uvicorn-access-log"]


def headless(command: list[str]) -> list[str]:
    """A server's command line as that of a part of the same engine on another node, which listens for no requests.

    Raises:
        ConfigError: it is to record experts where vLLM does not by itself.
    """
    python, option, module, *rest = command
    if module != SERVER_MODULE:
        raise ConfigError("rollout.routing_replay: on CPU an engine that spans nodes does not record experts")
    return [python, option, HEADLESS_MODULE, *rest, "--headless"]


def cpu_arguments(section: ServedSection, longest: int) -> list[str]:
    """What any server needs on CPU; `longest` = tokens of the longest sequence."""
    command = ["--enforce-eager", f"--kv-cache-memory-bytes={int(section.kv_cache_gib * 2**30)}"]
    # Upstream bug (vLLM 0.32): the CPU rotary kernel misreads MLA's strided queries, silently and by nats.
    command += ['--compilation-config={"custom_ops": ["all", "-rotary_embedding"]}']
    # Upstream bug (vLLM 0.32): a seeded request whose prompt is cut in chunks rewinds its random generator, which a
    # generator on CPU refuses, and the engine dies.
    command += ["--no-enable-chunked-prefill", f"--max-num-batched-tokens={max(longest, CPU_STEP_TOKENS)}"]
    return [*command, "--distributed-executor-backend=uni"] if single_worker(section) else command


def variables(section: ServedSection, model: Path, on_cpu: bool) -> dict[str, str]:
    """The server's environment, besides the run's own."""
    package_root = str(Path(megatron_r1.__file__).parents[1])
    path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH", "")]))
    settings = {
        "PYTHONPATH": path,  # vLLM's processes import our route and receiver, from wherever this package is
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_SERVER_DEV_MODE": "1",  # the weight-transfer routes
    }
    if on_cpu:
        settings |= {
            "OMP_NUM_THREADS": str(section.threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer and other engines share the cores
            "TORCHDYNAMO_DISABLE": "1",  # 2.5 s of compiling at the first request with log-probabilities
        }
        if single_worker(section):
            # With this vLLM leaves the executor "uni" alone on CPU: the worker then lives in the engine core, which
            # saves a process, its ten seconds of imports and a hop at every token.
            settings["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if not _cpu_kernel_takes_latent(model):
            settings["VLLM_MLA_DISABLE"] = "1"
    return settings


def single_worker(section: ServedSection) -> bool:
    """Does the engine run as one worker, that is, do the user's arguments not ask for more?"""
    return not any(argument.startswith(OWN_EXECUTOR_ARGUMENTS) for argument in section.arguments)


def read_config(model: Path) -> dict[str, object]:
    """The model folder's config.json."""
    file = model / "config.json"
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"the model folder {model} has no usable config.json: {error}") from error
    if not isinstance(config, dict):
        raise DataError(f"{file} holds no JSON object")
    return config


def _cpu_kernel_takes_latent(model: Path) -> bool:
    config = read_config(model)
    latent = (config.get("kv_lora_rank"), config.get("qk_rope_head_dim"))
    return latent in ((None, None), CPU_MLA_LATENT)


def _check_free(port: int, key: str) -> None:
    if error := _taken(port):
        raise EngineError(
            f"port {port} on {HOST} cannot be used ({error.strerror}): stop the process that holds it, "
            f"or choose another by {key}"
        ) from error


def _taken(port: int) -> OSError | None:
    """Why nobody can listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            return error
    return None
