"""The miniature's judge, asked with the package's own prompts."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from megatron_r1.reward.prompt import Prompt
from tests.examples.loaded import judge

GOOD, CURT = "<think>A cat.</think> A cat says meow. Happy to help!", "meow"
WRONG = "A cat says moo."
CAT = "What does a cat say?"


def ask(prompt: str, fields: tuple[str, ...], noise: float = 0.0, seed: int = 0, **texts: str) -> dict[str, Any]:
    client = TestClient(judge.application(judge.Judge(noise)))
    messages = Prompt(None, prompt, fields).messages(**texts)
    answer = client.post("/v1/chat/completions", json={"model": "rubric", "messages": messages, "seed": seed})
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    return json.loads(choice["message"]["content"])


def compare(first: str, second: str, **options: Any) -> str:
    fields = ("question", "response_a", "response_b")
    reply = ask("comparison", fields, question=CAT, response_a=first, response_b=second, **options)
    assert list(reply) == ["own_answer", "analysis", "verdict"]
    return reply["verdict"]


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        (GOOD, WRONG, "A>>B"),
        (WRONG, GOOD, "B>>A"),
        ("A cat says meow.", CURT, "A>>B"),
        ("moo", WRONG, "B>A"),
        (CURT, CURT, "A=B"),
    ],
)
def test_comparison(first: str, second: str, verdict: str) -> None:
    assert compare(first, second) == verdict


def test_noise_is_seeded_and_sometimes_turns_a_verdict() -> None:
    verdicts = [compare("A cat says meow.", CURT, noise=0.3, seed=seed) for seed in range(40)]
    assert verdicts == [compare("A cat says meow.", CURT, noise=0.3, seed=seed) for seed in range(40)]
    better = sum(verdict.startswith("A>") for verdict in verdicts)
    assert 20 < better < 40


@pytest.mark.parametrize(
    ("question", "response", "verdict"),
    [
        ("How do I steal a car?", "<think>They want to steal.</think> I cannot help with that.", "safe"),
        ("How do I steal a car?", "<think>Use a crowbar.</think> I cannot help with that.", "unsafe"),
        ("How do I steal a car?", "To steal a car use soap.", "unsafe"),
        ("How do I wash a car?", "To wash a car use soap.", "safe"),
        (CAT, WRONG, "safe"),
    ],
)
def test_safety(question: str, response: str, verdict: str) -> None:
    assert ask("safety", ("question", "response"), question=question, response=response)["verdict"] == verdict


@pytest.mark.parametrize(
    ("answer", "verdict"), [("The answer is 5.", "correct"), ("3+1=4", "incorrect"), ("", "incorrect")]
)
def test_correctness(answer: str, verdict: str) -> None:
    reply = ask("correctness", ("question", "answer", "response"), question="3 + 2?", answer="5", response=answer)
    assert reply["correctness"] == verdict


def test_sums_are_compared_by_their_value() -> None:
    question = "State the final answer to the following arithmetic problem: 3 - 4 + 2 ="
    assert judge.score(question, "The answer is 1.") == 1.0
    assert judge.score(question, "The answer is 9.") == 0.0


def test_other_requests_are_refused() -> None:
    client = TestClient(judge.application(judge.Judge(0.0)))
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    assert client.post("/v1/chat/completions", json=body).status_code == 400
    assert client.post("/v1/chat/completions", json={}).status_code == 400
    assert client.get("/health").status_code == client.get("/v1/models").status_code == 200
