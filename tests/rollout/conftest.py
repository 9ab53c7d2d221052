"""Models and real vLLM servers, shared by the tests of this folder."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV3ForCausalLM

from megatron_r1.rollout.fleet import Fleet
from tests.rollout.tiny_model import decode, free_port, rollout_section, write_model


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one shape with different weights."""
    folder = tmp_path_factory.mktemp("models")
    return write_model(folder / "first", seed=1), write_model(folder / "second", seed=2)


@pytest.fixture(scope="session")
def fleets(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Fleet, Fleet]]:
    """One server with each model; they start at the same time."""

    def start(model: Path) -> Fleet:
        return Fleet(rollout_section(free_port()), model, tmp_path_factory.mktemp("run"), "float32", decode)

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(start, models)
    with first, second:
        yield first, second


@pytest.fixture(scope="session")
def reference() -> Callable[[Path, list[int], list[int], float], torch.Tensor]:
    """transformers' log-probabilities of a response's tokens after a prompt, at a temperature."""
    loaded: dict[Path, DeepseekV3ForCausalLM] = {}

    def logprobs(folder: Path, prompt: list[int], response: list[int], temperature: float) -> torch.Tensor:
        if folder not in loaded:
            loaded[folder] = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            logits = loaded[folder](torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]

    return logprobs
