"""What an endpoint may do wrong, over a real socket; and vLLM's own server, held to a schema."""

import json
from collections.abc import Iterator
from typing import Annotated, Literal

import pytest
from pydantic import Field
from starlette.responses import JSONResponse, PlainTextResponse

from megatron_r1.config.chat_endpoint import ChatEndpointSection
from megatron_r1.errors import ConfigError, EngineError
from megatron_r1.reward.chat_endpoint import ChatEndpoint, Verdict
from megatron_r1.rollout.client import Client, wait_until_healthy
from megatron_r1.rollout.server import Server, base_arguments, cpu_arguments, variables
from tests.reward.scripted_endpoint import Answer, completion, one_by_one, scripted
from tests.rollout.tiny_classifier import write_tokenizer
from tests.rollout.tiny_model import free_port, rollout_section, write_model

ASKED = [{"role": "user", "content": "Is 5 right?"}]


class Judgement(Verdict):
    analysis: str
    correctness: Literal["correct", "incorrect"]


GOOD = {"analysis": "5 = 5", "correctness": "correct"}
RIGHT = Judgement(analysis="5 = 5", correctness="correct")


def endpoint(url: str, **changes: object) -> ChatEndpoint:
    settings = {"url": url, "model": "judge", "backoff": 0.01, "timeout": 20.0, "retries": 2}
    return ChatEndpoint(ChatEndpointSection.model_validate(settings | changes))


def seen(asked: ChatEndpoint) -> dict[str, int]:
    """The counters that are not zero."""
    return {name: count for name, count in asked.counters.items() if count}


def test_the_request() -> None:
    with scripted(lambda body: GOOD) as server:
        extra = {"chat_template_kwargs": {"enable_thinking": False}}
        asked = endpoint(server.url, temperature=0.7, max_tokens=99, extra=extra)
        assert asked.ask(ASKED, Judgement, seed=7).result() == RIGHT
        assert asked.text(ASKED, seed=8).result() == json.dumps(GOOD)
    shared = {"model": "judge", "messages": ASKED, "temperature": 0.7, "max_tokens": 99, **extra}
    schema = server.requests[0].pop("response_format")["json_schema"]
    assert server.requests == [{**shared, "seed": 7}, {**shared, "seed": 8}]
    assert schema["strict"]
    assert list(schema["schema"]["properties"]) == ["analysis", "correctness"], "it reasons before it decides"
    assert schema["schema"]["required"] == ["analysis", "correctness"]
    assert schema["schema"]["additionalProperties"] is False
    assert seen(asked) == {}


@pytest.mark.parametrize(
    ("bad", "counter"),
    [
        ("I would say it is correct.", "nonsense"),
        ("", "nonsense"),
        ({"analysis": "so"}, "nonsense"),
        ({**GOOD, "correctness": "maybe"}, "nonsense"),
        ({**GOOD, "confidence": 1}, "nonsense"),
        ('{"analysis": "so", "correctness": "corr', "nonsense"),
        ("[" * 100_000 + "{}", "nonsense"),
        ('{"a":' * 100_000 + "}", "nonsense"),
        (completion(json.dumps(GOOD), finish_reason="length"), "nonsense"),
        (completion(None), "nonsense"),
        (JSONResponse({"choices": []}), "nonsense"),
        (JSONResponse(["choices"]), "nonsense"),
        (PlainTextResponse("<html>"), "nonsense"),
        (PlainTextResponse("busy", 429, {"retry-after": "0"}), "refused"),
        (PlainTextResponse("oops", 500), "refused"),
        (PlainTextResponse("gateway", 503), "refused"),
    ],
)
def test_what_goes_wrong_is_asked_again(bad: Answer, counter: str) -> None:
    """Twice bad, then good: the answer; always bad: None, and counted."""
    with scripted(one_by_one(bad, bad, GOOD)) as server:
        asked = endpoint(server.url)
        assert asked.ask(ASKED, Judgement, seed=1).result() == RIGHT
        assert seen(asked) == {counter: 2}
        assert [request["seed"] for request in server.requests] == [1, 2, 3], "the same seed gives the same nonsense"
    with scripted(one_by_one(bad)) as server:
        asked = endpoint(server.url)
        assert asked.ask(ASKED, Judgement).result() is None
        assert seen(asked) == {counter: 3, "failed": 1}


@pytest.mark.parametrize(
    "text",
    ["```json\n{}\n```", "<think>Is it {{correct}}?</think>\n{}", "Here it is: {} Bye."],
)
def test_json_is_found_in_its_wrapping(text: str) -> None:
    with scripted(lambda body: text.replace("{}", json.dumps(GOOD))) as server:
        asked = endpoint(server.url, json_schema=False)
        assert asked.ask(ASKED, Judgement).result() == RIGHT
    assert "response_format" not in server.requests[0]


def test_a_line_break_in_a_string_passes() -> None:
    with scripted(lambda body: '{"analysis": "5 =\n5", "correctness": "correct"}') as server:
        answer = endpoint(server.url).ask(ASKED, Judgement).result()
    assert answer == Judgement(analysis="5 =\n5", correctness="correct")


def test_slow_answers_are_given_up() -> None:
    with scripted(lambda body: GOOD, seconds=0.5) as server:
        asked = endpoint(server.url, timeout=0.1, retries=1)
        assert asked.ask(ASKED, Judgement).result() is None
        assert seen(asked) == {"timeouts": 2, "failed": 1}


def test_a_question_that_cannot_be_asked_is_not_repeated() -> None:
    with scripted(lambda body: PlainTextResponse("too long", 400)) as server:
        asked = endpoint(server.url)
        assert asked.ask(ASKED, Judgement).result() is None
        assert seen(asked) == {"refused": 1, "failed": 1}


def test_nobody_there() -> None:
    asked = endpoint(f"http://127.0.0.1:{free_port()}/v1", retries=1)
    with pytest.raises(EngineError, match="no model answers at"):
        asked.prepare()
    assert asked.ask(ASKED, Judgement).result() is None
    assert seen(asked) == {"unreachable": 2, "failed": 1}


def test_one_that_never_works_stops_the_run() -> None:
    with scripted(lambda body: "no") as server:
        asked = endpoint(server.url, retries=0, give_up_after=3, max_concurrency=1)
        futures = [asked.ask(ASKED, Judgement) for _ in range(3)]
        assert [future.result() for future in futures[:2]] == [None, None]
        with pytest.raises(EngineError, match=r"failed 3 questions in a row, each asked 1 time; .*not a Judgement"):
            futures[2].result()
    with scripted(one_by_one("no", "no", GOOD, "no", "no", GOOD)) as server:
        asked = endpoint(server.url, retries=0, give_up_after=3, max_concurrency=1)
        answers = [future.result() for future in [asked.ask(ASKED, Judgement) for _ in range(6)]]
        assert answers == [None, None, RIGHT, None, None, RIGHT]


def test_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted(lambda body: GOOD) as server:
        asked = endpoint(server.url, api_key_env="TEST_JUDGE_KEY")
        with pytest.raises(ConfigError, match="'TEST_JUDGE_KEY' is not set"):
            asked.prepare()
        monkeypatch.setenv("TEST_JUDGE_KEY", "secret")
        asked.prepare()
        assert asked.ask(ASKED, Judgement).result() == RIGHT
        assert server.headers[-1]["authorization"] == "Bearer secret"


def test_a_refused_key_ends_the_run() -> None:
    with scripted(lambda body: PlainTextResponse("who are you?", 401)) as server:
        answer = endpoint(server.url).ask(ASKED, Judgement)
        with pytest.raises(ConfigError, match=r"HTTP 401 \(who are you\?\): check `url`, `model` = 'judge'"):
            answer.result()


def test_questions_are_in_flight_together() -> None:
    with scripted(lambda body: GOOD, seconds=0.05) as server:
        asked = endpoint(server.url, max_concurrency=8)
        assert [future.result() for future in [asked.ask(ASKED, Judgement) for _ in range(40)]] == [RIGHT] * 40
    assert server.at_once == 8


class Bounded(Verdict):
    """A schema that random weights come to the end of."""

    analysis: Annotated[str, Field(max_length=12)]
    score: Literal[-1, 0, 1]
    verdict: Literal["A>>B", "A>B", "A=B", "B>A", "B>>A"]


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of vLLM's own server with a tiny model of random weights."""
    model = write_model(tmp_path_factory.mktemp("model") / "hf", seed=1)
    write_tokenizer(tmp_path_factory.mktemp("corpus"), model)
    template = model / "chat.jinja"
    template.write_text("{% for message in messages %}{{ message['content'] }} {% endfor %}")
    section = rollout_section(free_port(), max_num_seqs=16)
    command = base_arguments(section, model, "float32", section.port) + cpu_arguments(section, longest=256)
    command += ["--max-model-len=256", f"--chat-template={template}", "--served-model-name=judge"]
    # White space between tokens of JSON is allowed otherwise, and random weights never leave it.
    command += ['--structured-outputs-config={"backend": "xgrammar", "disable_any_whitespace": true}']
    server = Server(command, variables(section, model, on_cpu=True), section.port, model / "log", "port")
    client = Client(server, timeout=60.0)
    try:
        wait_until_healthy([client], 240.0, "the test's patience")
        yield f"{server.url}/v1"
    finally:
        server.close()
        client.close()


def test_vllm_is_held_to_the_schema(vllm: str) -> None:
    """Random weights write noise, and still every answer is a verdict."""
    asked = endpoint(vllm, temperature=1.0, max_tokens=200, timeout=200.0, retries=5)
    asked.prepare()
    answers = [future.result() for future in [asked.ask(ASKED, Bounded, seed) for seed in range(0, 80, 10)]]
    assert all(isinstance(answer, Bounded) for answer in answers)
    assert len({answer.model_dump_json() for answer in answers if answer}) > 1
    assert asked.counters["failed"] == 0
    free = endpoint(vllm, temperature=1.0, max_tokens=60, timeout=200.0, json_schema=False, retries=0)
    assert free.ask(ASKED, Bounded).result() is None, "unconstrained, the same weights write no JSON"
    with pytest.raises(ConfigError, match="404"):
        endpoint(vllm, model="unknown").ask(ASKED, Bounded).result()
