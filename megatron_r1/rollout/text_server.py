"""A finished model behind vLLM's own OpenAI-compatible routes, for programs that ask with text or token ids."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch

from megatron_r1.config.evaluation import ServedModelSection
from megatron_r1.config.lm_eval import TextServerSection
from megatron_r1.rollout.client import CONTROL_SECONDS, Client, wait_until_healthy
from megatron_r1.rollout.server import Server, base_arguments, cpu_arguments, variables


@contextmanager
def text_server(model: ServedModelSection, tokenizer: Path, section: TextServerSection, log: Path) -> Iterator[Client]:
    """Start the server, wait until it answers, and end it with the block.

    Args:
        model: what it serves, under the name `served_name(model)`.
        tokenizer: a Hugging Face folder.
        section: where it listens, and its limits.
        log: file that its output is appended to.

    Raises:
        DataError: the model folder has no readable config.json.
        EngineError: the port is in use, or the server died at start or was not ready in time.
    """
    on_cpu = not torch.cuda.is_available()
    command = arguments(model, tokenizer, section, on_cpu)
    environment = variables(section, model.path, on_cpu)
    server = Server(command, environment, section.port, log, "rollout.port")
    with closing(server), closing(Client(server, CONTROL_SECONDS)) as client:
        wait_until_healthy([client], section.start_timeout, "rollout.start_timeout")
        yield client


def arguments(model: ServedModelSection, tokenizer: Path, section: TextServerSection, on_cpu: bool) -> list[str]:
    """The server's command line; the user's own arguments come last, so they win."""
    command = base_arguments(section, model.path, model.dtype, section.port)
    command += [f"--served-model-name={served_name(model)}", f"--tokenizer={tokenizer.resolve()}"]
    # What a request leaves open is vLLM's neutral default, not what the model's generation_config.json says.
    command += [f"--max-model-len={section.max_model_len}", "--generation-config=vllm"]
    if on_cpu:
        command += cpu_arguments(section, section.max_model_len)
    return command + section.arguments


def served_name(model: ServedModelSection) -> str:
    """What requests call the model: the name of its folder."""
    return model.path.resolve().name
