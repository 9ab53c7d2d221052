"""A reward model's score as a reward; the server here counts letters (tests/rollout/test_scorer.py has a real one)."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from megatron_r1.errors import EngineError
from megatron_r1.reward.judge import Judge
from megatron_r1.reward.reward_model import SCORE_PATH
from megatron_r1.types import Group, Question, Sample
from tests.reward.sandbox.serving import serving

TEXTS = ("<think>Hm.</think> Four", "<think>Well.</think>\n\nSeventeen\n", "<think>never ends", "Four")


@contextmanager
def letters(status: int = 200, healthy: bool = True) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Address of a server that counts letters, and what it was asked."""
    asked: list[dict[str, Any]] = []

    async def score(request: Request) -> Response:
        asked.append(await request.json())
        if status != 200:
            return PlainTextResponse("out of memory", status)
        return JSONResponse({"scores": [float(len(text)) for text in asked[-1]["responses"]]})

    async def health(request: Request) -> Response:
        return Response(status_code=200 if healthy else 503)

    with serving(Starlette(routes=[Route(SCORE_PATH, score, methods=["POST"]), Route("/health", health)])) as url:
        yield url, asked


def group(*texts: str, prompt: str = "User: How many? Assistant:") -> Group:
    return Group(Question("q", "general", prompt, ""), [], [Sample([], [], text, True, 0) for text in texts])


def scored(asked: Group, url: str, **keys: Any) -> list[float | None]:
    with Judge({"it": {"type": "reward_model", "url": url, **keys}}) as judge:
        judge([asked])
    return [sample.rewards["it"] for sample in asked.samples]


def test_one_request_for_the_summaries_of_a_group() -> None:
    with letters() as (url, asked):
        assert scored(group(*TEXTS), f"{url}/") == [4.0, 9.0, 4.0, 4.0], "without a summary: the least of the group"
    assert asked == [{"prompt": "User: How many? Assistant:", "responses": ["Four", "Seventeen"]}]


def test_the_whole_response() -> None:
    with letters() as (url, asked):
        assert scored(group(*TEXTS), url, part="response") == [float(len(text.strip())) for text in TEXTS]
    assert asked[0]["responses"][1] == "<think>Well.</think>\n\nSeventeen"


def test_a_template_that_opens_the_reasoning() -> None:
    """Then the response itself has no `<think>`; cut short, it is all reasoning."""
    texts = ("Hm.</think>Four", "Hm, hm", "Hm.</think>Seventeen")
    with letters() as (url, asked):
        assert scored(group(*texts, prompt="How many?<think>\n"), url) == [4.0, 4.0, 9.0]
        scored(group(*texts, prompt="How many?<think>\n"), url, part="response")
    assert asked[1]["responses"] == list(texts), "the prompt already holds the tag"


def test_without_any_summary_there_is_no_score() -> None:
    with letters() as (url, asked):
        assert scored(group("<think>a", "<think>b", ""), url) == [None, None, None]
    assert not asked


def test_normalised() -> None:
    with letters() as (url, _):
        assert scored(group(*TEXTS), url, mean=5.0, std=2.0, scale=3.0) == [-1.5, 6.0, -1.5, -1.5]
        squashed = scored(group(*TEXTS), url, mean=5.0, std=2.0, scale=3.0, sigmoid=True)
        assert squashed[:2] == pytest.approx([3 / (1 + math.exp(0.5)), 3 / (1 + math.exp(-2.0))])
        assert scored(group("x" * 5000, "x"), url, mean=2500.0, sigmoid=True) == [1.0, 0.0], "no overflow"


def test_many_groups_are_in_flight() -> None:
    groups = [group("<think></think>" + "x" * number, "y" * 3) for number in range(1, 30)]
    with letters() as (url, asked), Judge({"it": {"type": "reward_model", "url": url}}) as judge:
        sitting = judge.sitting()
        for one in groups:
            sitting.submit(one)
        sitting.finish()
    assert [one.samples[0].reward for one in groups] == [float(number) for number in range(1, 30)]
    assert len(asked) == 29


def test_a_server_that_fails_ends_the_run() -> None:
    with letters(status=500) as (url, _), pytest.raises(EngineError, match="HTTP 500: out of memory"):
        scored(group("a"), url)
    with letters(healthy=False) as (url, _), pytest.raises(EngineError, match="HTTP 503"):
        scored(group("a"), url)
    with letters() as (url, _):
        pass
    with pytest.raises(EngineError, match="no reward model answers"):
        scored(group("a"), url)
