"""Reward models behind real vLLM servers, against transformers."""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from megatron_r1.config.reward_model_server import RewardModelServerSection
from megatron_r1.errors import ConfigError, DataError, EngineError
from megatron_r1.reward.judge import Judge
from megatron_r1.reward.reward_model import SCORE_PATH
from megatron_r1.rollout.scorer import Scorers
from megatron_r1.types import Group, Question, Sample
from tests.rollout.tiny_classifier import write_deepseek, write_llama, write_tokenizer
from tests.rollout.tiny_model import free_port, write_model

PROMPT = "User: 3 + 4 - 2? Assistant:"
RESPONSES = [" 5", "<think>3+4=7, 7-2=5</think> <answer>5</answer>", "Prüfung </s> <s>", "7" * 40, "  five \n"]


def section(path: Path, **changes: object) -> RewardModelServerSection:
    settings = {"port": free_port(), "dtype": "float32", "max_model_len": 128, "kv_cache_gib": 0.1}
    return RewardModelServerSection.model_validate({"path": path, **settings, **changes})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reward-models")
    written = {"deepseek": write_deepseek(folder / "deepseek", 1), "llama": write_llama(folder / "llama", 2)}
    for name, path in written.items():
        write_tokenizer(folder / f"corpus-{name}", path)
    return written


@pytest.fixture(scope="module")
def scorers(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scorers]:
    with Scorers({name: section(path) for name, path in folders.items()}, tmp_path_factory.mktemp("run")) as started:
        yield started


def address(scorers: Scorers, name: str) -> str:
    return f"http://127.0.0.1:{scorers.sections[name].port}"


def expected(folder: Path, responses: list[str]) -> list[float]:
    """By transformers' model and tokenizer, one sequence at a time, with the ends put on by hand."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = []
    for text in responses:
        prompt, response = (tokenizer(part, add_special_tokens=False).input_ids for part in (PROMPT, text))
        with torch.no_grad():
            scores.append(model(torch.tensor([[1, *prompt, *response, 2]])).logits.item())
    return scores


@pytest.mark.parametrize("name", ["deepseek", "llama"])
def test_scores_are_those_of_transformers(scorers: Scorers, folders: dict[str, Path], name: str) -> None:
    request = {"prompt": PROMPT, "responses": RESPONSES}
    answer = httpx.post(address(scorers, name) + SCORE_PATH, json=request, timeout=60)
    want = expected(folders[name], RESPONSES)
    assert answer.json()["scores"] == pytest.approx(want, abs=1e-4)
    assert max(want) - min(want) > 0.1, "a model whose scores are all alike proves nothing"
    assert any(not 0 <= score <= 1 for score in want), "as raw scores they are told from probabilities"


def test_the_reward(scorers: Scorers, folders: dict[str, Path]) -> None:
    """The summary of each response, normalised; one that never ends its reasoning gets the least of its group."""
    rewards = {
        "helpful": {"type": "reward_model", "url": address(scorers, "llama"), "mean": 0.5, "std": 2.0, "weight": 3.0},
        "safe": {"type": "reward_model", "url": address(scorers, "deepseek"), "part": "response", "sigmoid": True},
    }
    texts = ["<think>a</think>  5 ", "<think>b</think>7", "<think>never", "<think>c</think>5"]
    groups = [
        Group(Question("q", "general", PROMPT, ""), [], [Sample([], [], text, True, 0) for text in texts])
        for _ in range(3)
    ]
    with Judge(rewards) as judge:
        judge(groups)
    five, seven = ((score - 0.5) / 2.0 for score in expected(folders["llama"], ["5", "7"]))
    whole = [1 / (1 + math.exp(-score)) for score in expected(folders["deepseek"], [text.strip() for text in texts])]
    for group in groups:
        parts = [sample.rewards for sample in group.samples]
        assert [part["helpful"] for part in parts] == pytest.approx([five, seven, min(five, seven), five], abs=1e-4)
        assert [part["safe"] for part in parts] == pytest.approx(whole, abs=1e-4)
        assert group.samples[0].reward == pytest.approx(3 * five + whole[0], abs=3e-4)


def test_a_text_without_room_is_refused(scorers: Scorers) -> None:
    reward = {"type": "reward_model", "url": address(scorers, "llama")}
    group = Group(Question("q", "general", PROMPT, ""), [], [Sample([], [], "7" * 500, True, 0)])
    with Judge({"it": reward}) as judge, pytest.raises(EngineError, match=r"413.*max_model_len = 128: raise it"):
        judge([group])


def test_what_is_no_reward_model_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    generator = write_model(tmp_path / "generator", seed=1)
    with pytest.raises(DataError, match=r"is no reward model: its config\.json names DeepseekV3ForCausalLM"):
        Scorers({"it": section(generator)}, tmp_path).__enter__()
    with pytest.raises(ConfigError, match="a `port` of its own"):
        Scorers({name: section(path, port=8720) for name, path in folders.items()}, tmp_path)


def test_a_missing_server_is_found_before_the_run(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(EngineError, match=r"no reward model answers at .*\[reward_models\]"):
        Judge({"it": {"type": "reward_model", "url": url}}).__enter__()


def test_servers_end_with_the_run(folders: dict[str, Path], tmp_path: Path) -> None:
    """One that cannot start takes the other with it, and says why."""
    sections = {"good": section(folders["llama"]), "bad": section(folders["llama"], arguments=["--no-such-flag"])}
    with pytest.raises(EngineError, match="unrecognized arguments: --no-such-flag"):
        Scorers(sections, tmp_path).__enter__()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            httpx.get(f"http://127.0.0.1:{sections['good'].port}/health", timeout=1)
        except httpx.ConnectError:
            return
    pytest.fail("the other server still runs")
