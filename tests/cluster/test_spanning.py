"""A real fleet on three nodes, which are processes of this machine: an engine on two of them, a reward model on one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import tomli_w
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3ForCausalLM

from megatron_r1.config.reward_model_server import RewardModelServerSection, located
from megatron_r1.config.sections import RolloutSection
from megatron_r1.errors import EngineError
from megatron_r1.reward.judge import Judge
from megatron_r1.rollout.fleet import Fleet
from megatron_r1.rollout.token_gate import TOKEN_VARIABLE
from megatron_r1.types import Group, Question, Sample
from tests.processes import command_line
from tests.rollout.test_scorer import PROMPT, RESPONSES, expected
from tests.rollout.tiny_classifier import write_llama, write_tokenizer
from tests.rollout.tiny_model import decode, free_port, rollout_section, write_model

SECONDS = 900.0
pytestmark = pytest.mark.timeout(1800)
NODES = 3
PROMPTS = [[1, 5, 7], [1, 9, 11, 12]]


class Nodes:
    """The nodes of a fleet, as Slurm's tasks start them; a context manager.

    Args:
        model: what the engine serves.
        scorer: a reward model.
        folder: that the nodes share.
    """

    def __init__(self, model: Path, scorer: Path, folder: Path) -> None:
        self.folder = folder
        self.section = rollout_section(free_port(), arguments=["-tp=2"], request_timeout=300.0, start_timeout=SECONDS)
        settings = {"dtype": "float32", "max_model_len": 128, "kv_cache_gib": 0.1, "start_timeout": SECONDS}
        self.served = RewardModelServerSection(path=scorer, port=free_port(), **settings)
        run = {
            "model": {"path": str(model), "dtype": "float32"},
            "rollout": self.section.model_dump(mode="json", exclude_none=True),
            "reward_models": {"helpful": self.served.model_dump(mode="json", exclude_none=True)},
        }
        self._file = folder / "run.toml"
        self._file.write_text(tomli_w.dumps(run))
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Nodes":
        for node in range(NODES):
            own = {"SLURM_NODEID": str(node), "MEGATRON_R1_ADDRESS": "127.0.0.1", TOKEN_VARIABLE: "secret"}
            with (self.folder / f"node-{node}.log").open("wb") as log:
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "megatron_r1.cluster.engines", str(self._file), "--gpus-per-node=0",
                         f"--folder={self.folder}"],
                        env=os.environ | own, stdout=log, stderr=log,
                    )
                )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.send_signal(signal.SIGUSR1)
        codes = [process.wait(60) for process in self._processes]
        assert codes == [0] * NODES, self.said()

    def announced(self, node: int) -> list[str]:
        """What a node has said of its engines."""
        return (self.folder / f"{node}.engines").read_text().splitlines()

    def life(self) -> int:
        """How often the engine has begun."""
        return int(json.loads((self.folder / "engine-0.life").read_text())["number"])

    def until(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not happened():
            assert all(process.poll() is None for process in self._processes), self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.1)

    def running(self, node: int, what: str) -> list[psutil.Process]:
        """Processes of a node with a word in their command line."""
        below = psutil.Process(self._processes[node].pid).children(recursive=True)
        return [process for process in below if what in " ".join(command_line(process))]

    def said(self) -> str:
        return "\n".join(f"{file}:\n{file.read_text(errors='replace')[-3000:]}" for file in self.folder.glob("*.log"))

    def fleet(self, folder: Path, model: Path) -> Fleet:
        """The engine as a run sees it."""
        changes = {"addresses": [f"http://127.0.0.1:{self.section.port}"], "transport": "disk", "arguments": []}
        section = RolloutSection.model_validate(self.section.model_dump() | changes)
        return Fleet(section, model, folder, "float32", decode)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one shape with different weights."""
    folder = tmp_path_factory.mktemp("models")
    return write_model(folder / "first", seed=1), write_model(folder / "second", seed=2)


@pytest.fixture(scope="module")
def nodes(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    folder = tmp_path_factory.mktemp("nodes")
    scorer = write_llama(folder / "scorer", 2)
    write_tokenizer(folder / "corpus", scorer)
    with Nodes(models[0], scorer, folder) as running:
        running.until(lambda: all((folder / f"{node}.engines").exists() for node in range(NODES)))
        yield running


def weights(model: Path, file: Path) -> Path:
    """As a push writes them, without the layer that only drafts."""
    tensors: dict[str, torch.Tensor] = {}
    for part in model.glob("*.safetensors"):
        tensors |= load_file(part)
    save_file({name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.3.")}, file)
    return file


def assert_from(samples: list[list[Sample]], model: Path) -> None:
    """They have transformers' log-probabilities under this model."""
    reference = DeepseekV3ForCausalLM.from_pretrained(model, dtype=torch.float32)
    for prompt, group in zip(PROMPTS, samples, strict=True):
        for sample in group:
            with torch.no_grad():
                logits = reference(torch.tensor([prompt + sample.tokens])).logits[0, len(prompt) - 1 : -1]
            want = logits.log_softmax(-1).gather(1, torch.tensor(sample.tokens)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(sample.logprobs), want, atol=1e-4, rtol=0)


def ask(fleet: Fleet) -> list[list[Sample]]:
    return fleet.sample(PROMPTS, n=2, seed=3, max_tokens=8)


def test_an_engine_on_two_nodes_lives_and_dies_as_one(
    nodes: Nodes, models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers from new weights on both; when a worker of a part is killed, it comes back whole, with them."""
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    first, second = models
    assert nodes.announced(0) == [f"rollout.addresses\t0\thttp://127.0.0.1:{nodes.section.port}"]
    assert nodes.announced(1) == []
    assert nodes.running(1, "--node-rank=1")
    assert nodes.life() == 1
    with nodes.fleet(tmp_path, first) as fleet:
        before = ask(fleet)
        assert_from(before, first)
        fleet.update_weights(weights(second, tmp_path / "weights-1.safetensors"), 1)
        pushed = ask(fleet)
        assert_from(pushed, second)
        (head,) = nodes.running(0, "VLLM::EngineCore")
        (worker,) = nodes.running(1, "VLLM::Worker")
        worker.kill()
        nodes.until(lambda: nodes.life() == 2)
        assert ask(fleet) == pushed, "the run waits for it, gives it the weights that it had, and asks again"
        assert not head.is_running(), "the core of the life before is gone"


def test_a_reward_model_on_a_node_of_its_own(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards that name it by its port on loopback ask it where it is, and show the token."""
    key, index, address = nodes.announced(2)[0].split("\t")
    assert (key, index) == ("reward_models.helpful.address", "0")
    url = f"http://127.0.0.1:{nodes.served.port}"
    assert address != url, "nothing listens there"
    rewards = {"helpful": {"type": "reward_model", "url": url, "part": "response"}, "format": {"type": "format"}}
    elsewhere = located(rewards, {"helpful": nodes.served.model_copy(update={"address": address})})
    assert elsewhere["format"] == rewards["format"]
    assert located(rewards, {"helpful": nodes.served}) == rewards
    group = Group(Question("q", "general", PROMPT, ""), [], [Sample([], [], text, True, 0) for text in RESPONSES])
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with Judge({"helpful": elsewhere["helpful"]}) as judge, pytest.raises(EngineError, match="HTTP 401"):
        judge([group])
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    with Judge({"helpful": elsewhere["helpful"]}) as judge:
        judge([group])
    want = expected(nodes.served.path, [text.strip() for text in RESPONSES])
    assert [sample.rewards["helpful"] for sample in group.samples] == pytest.approx(want, abs=1e-4)
