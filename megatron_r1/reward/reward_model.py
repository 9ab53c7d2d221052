"""Reward-model reward: what a trained scalar head says of a response (DeepSeek-R1's helpful and safety rewards)."""

import math
import os
from collections.abc import Callable

import httpx
from pydantic import NonNegativeInt, PositiveFloat

from megatron_r1.config.section import Section
from megatron_r1.errors import EngineError
from megatron_r1.reward import background
from megatron_r1.reward.base import Reward, Scores
from megatron_r1.reward.response import Part, response, scored_part
from megatron_r1.types import Group, Question, Sample

SCORE_PATH = "/megatron_r1/score"
"""Route of the scorer (`rollout/score_route.py`)."""


class RewardModel(Reward):
    """`scale * (score - mean) / std` of the reward model's raw score, or `scale * sigmoid(...)` of that.

    The server makes the tokens, with the reward model's own tokenizer and as in training: [begin] + prompt + part of
    the response + [end]. A response without that part (its reasoning never closes) cannot be scored: it gets the lowest
    score of its group, so that leaving the summary out never pays; None where no response of the group has one.

    Where the score was fitted by the pairwise loss, only differences within a question mean something; the advantage
    takes the mean out again. `mean` and `std` put several rewards on one scale: the reward-model verb reports both.
    """

    class Config(Section):
        url: str
        """Address of a server of [reward_models], such as `http://127.0.0.1:8720`."""
        token_env: str | None = None
        """Environment variable with the token that the server asks for; None = it asks for none."""
        part: Part = "summary"
        """What is scored: R1's helpful model the `summary`, its safety model the whole `response`."""
        scale: float = 1.0
        mean: float = 0.0
        std: PositiveFloat = 1.0
        sigmoid: bool = False
        """Take the score as a logit: a probability from 0 to 1, as for a model of labels (safe or not)."""
        timeout: PositiveFloat = 300.0
        """Seconds that scoring one group may take."""
        retries: NonNegativeInt = 2

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._url = config.url.rstrip("/")
        token = os.environ.get(config.token_env, "") if config.token_env else ""
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def prepare(self) -> None:
        try:
            answer = httpx.get(f"{self._url}/health", timeout=self.config.timeout, trust_env=False)
        except httpx.HTTPError as error:
            raise EngineError(
                f"no reward model answers at {self._url} ({error}): a section of [reward_models] starts one"
            ) from error
        if answer.status_code != httpx.codes.OK:
            raise EngineError(f"the reward model at {self._url} answers HTTP {answer.status_code}: {answer.text[:500]}")

    def __call__(self, group: Group) -> Scores:
        return self.begin(group)()

    def begin(self, group: Group) -> Callable[[], Scores]:
        parts = [self._part(group.question, sample) for sample in group.samples]
        texts = list(dict.fromkeys(part for part in parts if part))
        if not texts:
            return lambda: [None] * len(parts)
        future = background.submit(self._ask(group.question.prompt, texts))

        def wait() -> Scores:
            scores = dict(zip(texts, map(self._normalised, future.result()), strict=True))
            lowest = min(scores.values())
            return [scores.get(part, lowest) for part in parts]

        return wait

    def _part(self, question: Question, sample: Sample) -> str:
        # The whole response follows the prompt, which may itself end in <think>.
        whole = self.config.part == "response"
        return scored_part(sample.text if whole else response(question, sample), self.config.part)

    def _normalised(self, score: float) -> float:
        value = (score - self.config.mean) / self.config.std
        if self.config.sigmoid:
            value = 0.5 * (1.0 + math.tanh(value / 2))  # the logistic function, without overflow
        return self.config.scale * value

    async def _ask(self, prompt: str, responses: list[str]) -> list[float]:
        """The raw score of each response. [responses]"""
        transport = httpx.AsyncHTTPTransport(retries=self.config.retries)  # of the connection
        asked = {"prompt": prompt, "responses": responses}
        async with httpx.AsyncClient(
            transport=transport, timeout=self.config.timeout, headers=self._headers, trust_env=False
        ) as client:
            try:
                answer = await client.post(self._url + SCORE_PATH, json=asked)
            except httpx.HTTPError as error:
                raise EngineError(
                    f"the reward model at {self._url} did not score a group: {type(error).__name__}: {error}; its log "
                    "is in logs/ of the run that serves it"
                ) from error
        if answer.status_code != httpx.codes.OK:
            raise EngineError(f"the reward model at {self._url} answers HTTP {answer.status_code}: {answer.text[:500]}")
        scores: list[float] = answer.json()["scores"]
        return scores
