"""Reward models of a run, each behind a vLLM server: `<Family>ForSequenceClassification` with one label."""

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from megatron_r1.config.reward_model_server import RewardModelServerSection
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.rollout.client import CONTROL_SECONDS, Client, wait_until_healthy
from megatron_r1.rollout.server import Server, base_arguments, cpu_arguments, read_config, variables

ARCHITECTURE = "ForSequenceClassification"


class Scorers:
    """The servers of [reward_models] that no one else has started; a context manager that waits until they answer and
    leaves no process behind.

    Args:
        sections: [reward_models] of the run file: name -> section.
        run_dir: the servers log to `<run_dir>/logs/reward-model-<name>.log`.

    Raises (on entering):
        ConfigError: two of them listen at one port.
        DataError: a folder that is no reward model.
        EngineError: a port is in use, or a server died at start or was not ready in time.
    """

    def __init__(self, sections: dict[str, RewardModelServerSection], run_dir: Path) -> None:
        ports = [section.port for section in sections.values()]  # rewards name them by it, wherever they are
        if len(set(ports)) < len(ports):
            raise ConfigError(f"reward_models: each needs a `port` of its own; they are {ports}")
        self.sections = sections
        self.run_dir = run_dir
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._stack:
            own = {name: section for name, section in self.sections.items() if not section.address}
            clients = {name: self._start(name, section) for name, section in own.items()}
            for name, client in clients.items():  # they start at the same time
                timeout = self.sections[name].start_timeout
                wait_until_healthy([client], timeout, f"reward_models.{name}.start_timeout")
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def _start(self, name: str, section: RewardModelServerSection) -> Client:
        server = scoring_server(name, section, self.run_dir / "logs" / f"reward-model-{name}.log")
        self._stack.callback(server.close)
        client = Client(server, CONTROL_SECONDS)
        self._stack.callback(client.close)
        return client


def scoring_server(name: str, section: RewardModelServerSection, log: Path) -> Server:
    """A server of vLLM's pooling runner with our route of texts to scores.

    Raises:
        DataError: the folder is no reward model.
        EngineError: the port is in use.
    """
    on_cpu = not torch.cuda.is_available()
    command = scoring_arguments(section, section.port, on_cpu)
    environment = variables(section, section.path, on_cpu)
    return Server(command, environment, section.port, log, f"reward_models.{name}.port")


def scoring_arguments(section: RewardModelServerSection, port: int, on_cpu: bool) -> list[str]:
    """A reward model's command line; the user's own arguments come last, so they win.

    Raises:
        DataError: the folder is no reward model.
    """
    longest = _check(section)
    command = base_arguments(section, section.path, section.dtype, port)
    command += ["--runner=pooling", f"--max-model-len={longest}"]
    command += ["--middleware=megatron_r1.rollout.score_route.ScoreRoute"]
    if on_cpu:
        command += cpu_arguments(section, longest)
    return command + section.arguments


def _check(section: RewardModelServerSection) -> int:
    """The longest sequence that the model takes, if it is a reward model."""
    config: dict[str, Any] = read_config(section.path)
    architectures = config.get("architectures") or ["none"]
    labels = config.get("num_labels", len(config.get("id2label", ())))  # transformers writes only the second
    if not architectures[0].endswith(ARCHITECTURE) or labels != 1:
        raise DataError(
            f"{section.path} is no reward model: its config.json names {architectures[0]} and {labels} labels; a "
            f"...{ARCHITECTURE} with one label was expected, as `megatron-r1 reward-model` writes it"
        )
    if not (section.path / "tokenizer.json").is_file():
        raise DataError(f"{section.path} holds no tokenizer.json, which the server needs")
    return section.max_model_len or int(config["max_position_embeddings"])
