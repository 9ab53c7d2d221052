"""Runs inside a vLLM server of a reward model: one route that scores the responses to a prompt, given as texts.

The tokens are made here, so whoever asks needs no tokenizer: [begin] + prompt + response + [end], each encoded by
itself, exactly as the reward model is trained. The score is the head's raw output at the last token.

vLLM loads it by `--middleware megatron_r1.rollout.score_route.ScoreRoute`. Request and answer::

    {"prompt": "User: Name a colour. Assistant:", "responses": ["Blue.", "No."]}
    {"scores": [1.25, -0.5]}
"""

import asyncio
import itertools
import json
import traceback
from functools import cached_property
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm import PoolingParams
from vllm.inputs.engine import tokens_input
from vllm.v1.engine.async_llm import AsyncLLM

from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.reward.reward_model import SCORE_PATH


class ScoreRoute:
    """ASGI middleware that answers `POST /megatron_r1/score` and passes everything else on."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._scorer: _Scorer | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != SCORE_PATH:
            await self.app(scope, receive, send)
            return
        request = json.loads(await Request(scope, receive).body())
        self._scorer = self._scorer or _Scorer(scope["app"].state.engine_client)
        try:
            scores = await self._scorer.scores(request["prompt"], request["responses"])
            answer = JSONResponse({"scores": scores})
        except _TooLongError as error:
            answer = JSONResponse({"error": str(error)}, status_code=413)
        except Exception as error:  # whatever vLLM raises goes to the run, which shows it to the user
            traceback.print_exc()
            answer = JSONResponse({"error": f"{type(error).__name__}: {error}"}, status_code=500)
        await answer(scope, receive, send)


class _TooLongError(Exception):
    """A response that the server has no room for."""


class _Scorer:
    """Texts to scores, by one engine."""

    def __init__(self, engine: AsyncLLM) -> None:
        self._engine = engine
        self._config: Any = engine.vllm_config.model_config
        self._numbers = itertools.count()

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.load(Path(self._config.tokenizer))

    async def scores(self, prompt: str, responses: list[str]) -> list[float]:
        """The raw score of each response. [responses]"""
        sequences = reward_model_tokens(self._tokenizer, prompt, responses)
        longest = max(map(len, sequences))
        if longest > self._config.max_model_len:
            raise _TooLongError(
                f"prompt and response have {longest} tokens, but the reward model takes max_model_len = "
                f"{self._config.max_model_len}: raise it in its section of [reward_models], or shorten the responses"
            )
        return list(await asyncio.gather(*map(self._score, sequences)))

    async def _score(self, tokens: list[int]) -> float:
        # The classifier's activation (sigmoid for one label) off: rewards want the logit.
        params = PoolingParams(task="classify", use_activation=False)
        score: float | None = None
        async for output in self._engine.encode(tokens_input(tokens), params, f"score-{next(self._numbers)}"):
            score = float(output.outputs.data.reshape(-1)[0])
        assert score is not None, "the engine ended a request without an output"
        return score


def reward_model_tokens(tokenizer: Tokenizer, prompt: str, responses: list[str]) -> list[list[int]]:
    """What the reward model reads of each response: [begin] + prompt + response + [end]. [responses][tokens]"""
    head = tokenizer.encode_prompt(prompt)
    return [head + tokenizer.encode(text) + [tokenizer.eos_id] for text in responses]
