"""The server of text, against transformers."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_r1.config.evaluation import ServedModelSection
from megatron_r1.config.lm_eval import TextServerSection
from megatron_r1.errors import EngineError
from megatron_r1.rollout.text_server import arguments, served_name, text_server
from tests.rollout.tiny_classifier import write_tokenizer
from tests.rollout.tiny_model import free_port, write_model

PROMPT = [1, 40, 41, 42, 43, 44]


def section(**changes: object) -> TextServerSection:
    settings = {"max_model_len": 64, "max_tokens": 32, "kv_cache_gib": 0.1, "threads": 1}
    return TextServerSection.model_validate({"port": free_port(), **settings, **changes})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModelSection:
    folder = write_model(tmp_path_factory.mktemp("model"), seed=1)
    write_tokenizer(tmp_path_factory.mktemp("corpus"), folder)
    # A server that read this would cut the likeliest tokens, and end at once.
    (folder / "generation_config.json").write_text('{"top_k": 1, "repetition_penalty": 9.0, "max_new_tokens": 1}')
    return ServedModelSection(path=folder, dtype="float32")


@pytest.fixture(scope="module")
def url(model: ServedModelSection, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("run") / "logs/server.log"
    with text_server(model, model.path, section(), log) as client:
        yield client.server.url
    assert not client.server.alive()


def completion(url: str, model: ServedModelSection, **request: object) -> dict[str, object]:
    asked = {"model": served_name(model), "temperature": 0, **request}
    answer = httpx.post(f"{url}/v1/completions", json=asked, timeout=60, trust_env=False)
    assert answer.status_code == httpx.codes.OK, answer.text
    choice: dict[str, object] = answer.json()["choices"][0]
    return choice


def test_logprobs_of_a_prompt(url: str, model: ServedModelSection) -> None:
    """As the harness asks for a log-likelihood."""
    choice = completion(url, model, prompt=PROMPT, echo=True, logprobs=1, max_tokens=1)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)(torch.tensor([PROMPT])).logits
    want = logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(PROMPT)[1:, None])[:, 0].tolist()
    found = choice["logprobs"]["token_logprobs"]
    assert found[0] is None
    assert found[1:-1] == pytest.approx(want, abs=1e-3)
    assert max(want) - min(want) > 0.1, "a model to which all tokens are alike proves nothing"


def test_text_in_and_out(url: str, model: ServedModelSection) -> None:
    """The likeliest tokens as text, of a prompt as text, without what generation_config.json says."""
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    network = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32).eval()
    text = "User: 3 + 4 - 2? Assistant:"
    prompt = [1, *tokenizer(text, add_special_tokens=False).input_ids]
    ids = list(prompt)
    for _ in range(8):
        with torch.no_grad():
            ids.append(int(network(torch.tensor([ids])).logits[0, -1].argmax()))
    assert 2 not in ids[len(prompt) :]
    for asked in (text, prompt):
        choice = completion(url, model, prompt=asked, max_tokens=8, return_token_ids=True)
        assert choice["token_ids"] == ids[len(prompt) :]
        assert choice["finish_reason"] == "length"
        # At the end vLLM leaves out the bytes of a character that is not complete.
        assert choice["text"].strip() == tokenizer.decode(ids[len(prompt) :]).rstrip("\ufffd").strip()


def test_the_users_arguments_come_last(model: ServedModelSection, tmp_path: Path) -> None:
    command = arguments(model, tmp_path, section(arguments=["--max-model-len=48"]), on_cpu=False)
    assert command[-1] == "--max-model-len=48"
    assert f"--tokenizer={tmp_path}" in command
    assert not any(argument.startswith("--skip-tokenizer-init") for argument in command)


def test_a_server_that_does_not_start(model: ServedModelSection, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    section_with_typo = section(arguments=["--no-such-argument"])
    with (
        pytest.raises(EngineError, match=r"has died(.|\n)*no-such-argument"),
        text_server(model, model.path, section_with_typo, log),
    ):
        pytest.fail("it cannot have started")
