"""What engines are asked over HTTP (`batch_route.py`), and their answers, checked before they are trained on."""

from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import httpx
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, TypeAdapter, ValidationError

from megatron_r1.rollout.engine import SAMPLE_PATH, Decode, Sampling
from megatron_r1.types import Question, Sample

CONNECT_SECONDS = 10.0
LARGEST_LOGPROB = 1e-3
"""Above 0 by rounding."""


class GarbageError(ValueError):
    """An answer that no working engine gives."""


@dataclass(frozen=True)
class Ask:
    """Samples that one request asks for."""

    prompts: list[list[int]]
    seeds: list[list[int]]
    """Of each sample of each prompt. [prompts][samples]"""
    max_tokens: list[int]
    """Longest response to each prompt."""
    sampling: Sampling
    together: bool
    """Reproducibly, at the cost of everything else that the engine does."""
    questions: list[Question] | None = None
    """What the prompts ask, for the tools of a conversation; None = it is one turn."""

    def body(self) -> dict[str, Any]:
        """As the route reads it."""
        return {
            "prompts": self.prompts,
            "seeds": self.seeds,
            "together": self.together,
            **asdict(self.sampling),
            "max_tokens": self.max_tokens,
        }


class Response(BaseModel):
    """One sample, as the route gives it."""

    model_config = ConfigDict(frozen=True)

    prompt: NonNegativeInt
    """Number of the prompt in the request, as `sample` is among the prompt's seeds."""
    sample: NonNegativeInt
    tokens: list[NonNegativeInt] = Field(min_length=1)
    logprobs: list[FiniteFloat]
    finish_reason: Literal["stop", "length"]
    weight_versions: list[NonNegativeInt] = Field(min_length=1)
    """Of the weights that its tokens come from."""
    version_ends: list[NonNegativeInt] = []
    """Sampled tokens up to the last one of each of these; empty = one version made all of them."""
    mask: list[bool] = []
    """Of a conversation, as is `answer_from`: see `Sample`. Engines do not say these."""
    answer_from: NonNegativeInt = 0


class Other(BaseModel):
    """A line that holds no sample: a sign of life, or the end."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    error: str | None = None


_LINE: TypeAdapter[Response | Other] = TypeAdapter(Annotated[Response | Other, Field(union_mode="left_to_right")])


async def ask(
    http: httpx.AsyncClient, url: str, token: str, request: Ask, stall: float, versions: Callable[[], tuple[int, int]]
) -> AsyncGenerator[Response]:
    """Each sample of a request as soon as it is there, checked.

    Args:
        http: the connections.
        url: of the engine's server.
        token: what it wants to be shown.
        request: the samples.
        stall: seconds without a line after which the engine counts as hung.
        versions: of the oldest and the newest weights that may answer by now.

    Raises:
        GarbageError: something is wrong with an answer.
        httpx.HTTPError: with the connection, or the engine says so.
    """
    missing = {(prompt, sample) for prompt, seeds in enumerate(request.seeds) for sample in range(len(seeds))}
    headers = {"Authorization": f"Bearer {token}"}
    timeout = httpx.Timeout(stall, connect=min(stall, CONNECT_SECONDS), pool=None)
    async with http.stream("POST", url + SAMPLE_PATH, json=request.body(), headers=headers, timeout=timeout) as answer:
        if answer.status_code != httpx.codes.OK:
            await answer.aread()
            raise httpx.HTTPStatusError(answer.text[:500], request=answer.request, response=answer)
        async for line in answer.aiter_lines():
            if (response := _read(line)) is None:
                continue
            if (response.prompt, response.sample) not in missing:
                raise GarbageError(f"a sample that was not asked for, or is there already: {line[:200]}")
            _check(response, request, *versions())
            missing.remove((response.prompt, response.sample))
            yield response
    if missing:
        raise GarbageError(f"an answer without {len(missing)} of the samples that were asked for")


def to_sample(response: Response, decode: Decode) -> Sample:
    """As the trainer knows it."""
    return Sample(
        tokens=response.tokens,
        logprobs=response.logprobs,
        text=decode(response.tokens),
        finished=response.finish_reason == "stop",
        weight_version=min(response.weight_versions),
        weight_spans=list(zip(response.weight_versions, response.version_ends, strict=False)),
        mask=response.mask,
        answer_from=response.answer_from,
    )


def _read(line: str) -> Response | None:
    try:
        read = _LINE.validate_json(line)
    except ValidationError as error:
        raise GarbageError(f"a line that is no sample ({error.errors()[0]['msg']}): {line[:200]}") from error
    if isinstance(read, Response):
        return read
    if read.error is not None:
        raise GarbageError(f"an error: {read.error[:500]}")
    return None


def _check(response: Response, request: Ask, first: int, last: int) -> None:
    """Is this what the engine was asked for?"""
    tokens, longest = response.tokens, request.max_tokens[response.prompt]
    if len(response.logprobs) != len(tokens):
        raise GarbageError(f"{len(response.logprobs)} log-probabilities of {len(tokens)} tokens")
    if response.mask or response.answer_from:
        raise GarbageError("a response with tokens that it says are a tool's")
    if max(response.logprobs) > LARGEST_LOGPROB:
        raise GarbageError(f"a log-probability of {max(response.logprobs)}")
    whole = (
        tokens[-1] in request.sampling.stop_token_ids if response.finish_reason == "stop" else len(tokens) == longest
    )
    if not whole or len(tokens) > longest:
        raise GarbageError(
            f"a response of {len(tokens)} tokens (at most {longest}) that ended by {response.finish_reason!r} "
            f"with token {tokens[-1]}"
        )
    ends = response.version_ends or [len(tokens)]
    if len(ends) != len(response.weight_versions) or sorted(ends) != ends or ends[-1] != len(tokens):
        raise GarbageError(f"weights {response.weight_versions} up to tokens {ends} of {len(tokens)}")
    oldest, newest = min(response.weight_versions), max(response.weight_versions)
    if oldest < first or newest > last:
        raise GarbageError(f"a sample of weights {oldest} to {newest}, but it was given {first} to {last}")
