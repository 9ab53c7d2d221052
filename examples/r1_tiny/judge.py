"""A judge for the miniature: an OpenAI-compatible `/v1/chat/completions` that knows the rubrics of `world.py`.

    python examples/r1_tiny/judge.py --port 8000

No model of a million parameters can judge, so this server plays the part that DeepSeek-V3 and human annotators play
in the paper: it finds question and responses in the judge's prompt (`megatron_r1/reward/prompts/`), scores the
responses by the rubric, adds noise, and answers in the JSON that was asked for. The same request with the same `seed`
gets the same answer. To judge with a real model, point the `url` of the run file at its server instead.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from megatron_r1.registry import resolve

world = sys.modules[resolve("task", f"{Path(__file__).with_name('world.py')}:General").__module__]

SLIGHTLY, SIGNIFICANTLY = 0.03, 0.15
"""Differences of scores from which on one response is called better."""
_SUM = re.compile(r"problem: ([\d +-]+) =")
_NUMBER = re.compile(r"-?\d+")


@dataclass(frozen=True)
class Judge:
    """The rubric with noise."""

    noise: float
    """Standard deviation of what is added to each score; a safety label is wrong with half of this probability."""

    def answer(self, prompt: str, seed: int) -> dict[str, str]:
        """The verdict that `prompt` asks for.

        Raises:
            ValueError: it is none of the judge's prompts.
        """
        rng = random.Random(f"{seed}/{prompt}")
        kinds: dict[str, Callable[[str, random.Random], dict[str, str]]] = {
            "response_of_assistant_A": self.comparison,
            "reference_answer": self.correctness,
            "response": self.safety,
        }
        for tag, judged in kinds.items():
            if f"<{tag}>" in prompt:
                return judged(prompt, rng)
        raise ValueError(f"the prompt has none of the blocks {', '.join(kinds)}")

    def comparison(self, prompt: str, rng: random.Random) -> dict[str, str]:
        question = block(prompt, "user_prompt")
        responses = (block(prompt, f"response_of_assistant_{letter}") for letter in "AB")
        first, second = (score(question, text) + rng.gauss(0, self.noise) for text in responses)
        size = ">>" if abs(first - second) > SIGNIFICANTLY else ">" if abs(first - second) > SLIGHTLY else "="
        better = "A" if first >= second or size == "=" else "B"
        verdict = f"{better}{size}{'B' if better == 'A' else 'A'}"
        return {"own_answer": own_answer(question), "analysis": f"A {first:.2f}, B {second:.2f}", "verdict": verdict}

    def safety(self, prompt: str, rng: random.Random) -> dict[str, str]:
        helps = harms(block(prompt, "user_prompt"), block(prompt, "response"))
        mistaken = rng.random() < self.noise / 2
        verdict = "unsafe" if helps != mistaken else "safe"
        return {"analysis": "It helps to do harm." if helps else "No guideline is concerned.", "verdict": verdict}

    def correctness(self, prompt: str, rng: random.Random) -> dict[str, str]:
        numbers = _NUMBER.findall(block(prompt, "answer"))
        right = numbers[-1:] == [block(prompt, "reference_answer")]
        return {"analysis": f"It states {numbers[-1:]}.", "correctness": "correct" if right else "incorrect"}


def block(prompt: str, tag: str) -> str:
    """What stands between the tags.

    Raises:
        ValueError: there are none.
    """
    found = re.search(rf"<{tag}>\n(.*?)\n</{tag}>", prompt, re.DOTALL)
    if found is None:
        raise ValueError(f"the prompt has no block <{tag}>")
    return found[1].strip()


def score(question: str, response: str) -> float:
    """The rubric of a known prompt; a sum is right or wrong; of anything else nothing is known."""
    summary = response.rpartition("</think>")[2]
    if question in world.asks():
        return float(world.rubric(world.asks()[question], summary))
    if numbers := _SUM.search(question):
        return float(_NUMBER.findall(summary)[-1:] == [str(value(numbers[1]))])
    return 0.5


def harms(question: str, response: str) -> bool:
    """Whether any part of the response says how to do what is harmful."""
    ask = world.asks().get(question)
    return any(means in response for means in world.HARMFUL.values()) or (
        ask is not None and ask.kind == "harmful" and world.rubric(ask, response.rpartition("</think>")[2]) == 0.0
    )


def own_answer(question: str) -> str:
    """What the judge itself would say."""
    if numbers := _SUM.search(question):
        return str(value(numbers[1]))
    ask = world.asks().get(question)
    return "" if ask is None else f"{ask.kind}: {ask.y}"


def value(expression: str) -> int:
    """Of sums and differences."""
    return sum(int(term) for term in re.findall(r"[+-]?\d+", expression.replace(" ", "")))


def application(judge: Judge) -> Starlette:
    """The server's routes."""

    async def complete(request: Request) -> JSONResponse:
        asked: dict[str, Any] = await request.json()
        try:
            verdict = judge.answer(asked["messages"][-1]["content"], asked.get("seed", 0))
        except (LookupError, TypeError, ValueError) as error:
            return JSONResponse({"error": {"message": str(error)}}, status_code=400)
        message = {"role": "assistant", "content": json.dumps(verdict)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return JSONResponse({"object": "chat.completion", "model": asked.get("model", "rubric"), "choices": [choice]})

    async def models(request: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [{"id": "rubric", "object": "model"}]})

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({})

    return Starlette(
        routes=[
            Route("/v1/chat/completions", complete, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="The judge of the miniature.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--noise", type=float, default=0.1)
    options = parser.parse_args()
    uvicorn.run(application(Judge(options.noise)), host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
