"""What engines are asked over HTTP (`batch_route.py`), and their answers, checked before they are trained on."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal, Protocol, TypeVar

import httpx
import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PlainValidator,
    TypeAdapter,
    ValidationError,
)

from megatron_r1.rollout.engine import SAMPLE_PATH, Decode, Sampling
from megatron_r1.rollout.routed_experts import decode as decode_experts
from megatron_r1.types import Question, Sample

T = TypeVar("T")
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


def merged(requests: Sequence[Ask]) -> Ask:
    """Several of one sampling as one, their prompts behind each other."""
    questions = [question for one in requests for question in one.questions or ()]
    return replace(
        requests[0],
        prompts=[prompt for one in requests for prompt in one.prompts],
        seeds=[seeds for one in requests for seeds in one.seeds],
        max_tokens=[longest for one in requests for longest in one.max_tokens],
        questions=questions or None,
    )


class Response(BaseModel):
    """One sample, as the route gives it."""

    model_config = ConfigDict(frozen=True)

    prompt: NonNegativeInt
    """Number of the prompt in the request, as `sample` is among the prompt's seeds."""
    sample: NonNegativeInt
    tokens: list[NonNegativeInt]
    logprobs: list[FiniteFloat]
    finish_reason: Literal["stop", "length", "abort"]
    """`abort`: the engine was told to give back what it has, and there may be no token yet."""
    weight_versions: list[NonNegativeInt]
    """Of the weights that its tokens come from."""
    version_ends: list[NonNegativeInt] = []
    """Sampled tokens up to the last one of each of these; empty = one version made all of them."""
    routed_experts: Annotated[np.ndarray | None, PlainValidator(decode_experts)] = None
    """Which experts each token went to, where that was asked for. [prompt + response - 1, layers, experts a token]"""
    mask: list[bool] = []
    """Of a conversation, as is `answer_from`: see `Sample`. Engines do not say these."""
    answer_from: NonNegativeInt = 0


class Other(BaseModel):
    """A line that holds no sample: a sign of life, or the end."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    error: str | None = None


_LINE: TypeAdapter[Response | Other] = TypeAdapter(Annotated[Response | Other, Field(union_mode="left_to_right")])


class Meanwhile(Protocol):
    """What becomes of an engine while it answers."""

    def versions(self) -> tuple[int, int]:
        """Of the oldest and the newest weights that may answer by now."""
        ...

    def awake(self) -> float:
        """Since when it has not been loading weights, seconds of `time.monotonic()`; infinite while it does."""
        ...

    def cut(self) -> bool:
        """Whether it was told to give back what it has of responses."""
        ...


async def ask(
    http: httpx.AsyncClient, url: str, token: str, request: Ask, stall: float, meanwhile: Meanwhile
) -> AsyncGenerator[Response]:
    """Each sample of a request as soon as it is there, checked.

    Args:
        http: the connections.
        url: of the engine's server.
        token: what it wants to be shown.
        request: the samples.
        stall: seconds without a line after which the engine counts as hung; those in which it loads do not count.
        meanwhile: what is known of the engine.

    Raises:
        GarbageError: something is wrong with an answer.
        httpx.HTTPError: with the connection, or the engine says so.
    """
    missing = {(prompt, sample) for prompt, seeds in enumerate(request.seeds) for sample in range(len(seeds))}
    headers = {"Authorization": f"Bearer {token}"}
    timeout = httpx.Timeout(None, connect=min(stall, CONNECT_SECONDS))
    post = http.build_request("POST", url + SAMPLE_PATH, json=request.body(), headers=headers, timeout=timeout)
    answer = await _within(http.send(post, stream=True), stall, meanwhile)
    async with aclosing(answer):
        if answer.status_code != httpx.codes.OK:
            await answer.aread()
            raise httpx.HTTPStatusError(answer.text[:500], request=answer.request, response=answer)
        lines = answer.aiter_lines()
        while (line := await _within(_next(lines), stall, meanwhile)) is not None:
            if (response := _read(line)) is None:
                continue
            if (response.prompt, response.sample) not in missing:
                raise GarbageError(f"a sample that was not asked for, or is there already: {line[:200]}")
            if response.finish_reason == "abort" and not meanwhile.cut():
                raise GarbageError(f"a response that it was not told to abort: {line[:200]}")
            _check(response, request, *meanwhile.versions())
            missing.remove((response.prompt, response.sample))
            yield response
    if missing:
        raise GarbageError(f"an answer without {len(missing)} of the samples that were asked for")


async def _next(lines: AsyncIterator[str]) -> str | None:
    """None after the last one."""
    return await anext(lines, None)


async def _within(work: Coroutine[Any, Any, T], stall: float, meanwhile: Meanwhile) -> T:
    """What the engine says next.

    Raises:
        httpx.ReadTimeout: it is silent for too long.
    """
    asked, task = time.monotonic(), asyncio.ensure_future(work)
    try:
        while not task.done():
            left = max(asked, meanwhile.awake()) + stall - time.monotonic()
            if left <= 0:
                raise httpx.ReadTimeout(f"nothing for {stall:g} s")
            await asyncio.wait({task}, timeout=min(left, stall))
        return task.result()
    finally:
        task.cancel()
        await asyncio.wait({task})


def joined(begun: Response | None, rest: Response) -> Response:
    """A response that was cut, and what another request has added to it."""
    if begun is None:
        return rest
    spans = _spans(begun) + [(version, len(begun.tokens) + end) for version, end in _spans(rest)]
    # Where both sides of the cut are of the same weights, one span is as good as two.
    spans = [span for span, after in zip(spans, [*spans[1:], (-1, 0)], strict=True) if span[0] != after[0]]
    experts = rest.routed_experts
    if experts is not None and begun.routed_experts is not None:  # of a token's first pass, as of its log-probability
        experts = np.concatenate([begun.routed_experts, experts[len(begun.routed_experts) :]])
    return rest.model_copy(
        update={
            "routed_experts": experts,
            "tokens": begun.tokens + rest.tokens,
            "logprobs": begun.logprobs + rest.logprobs,
            "weight_versions": [version for version, _ in spans],
            "version_ends": [end for _, end in spans],
        }
    )


def _spans(response: Response) -> list[tuple[int, int]]:
    """(version, tokens up to its last one), without those of no token."""
    ends = response.version_ends or [len(response.tokens)]
    spans = zip(response.weight_versions, ends, [0, *ends], strict=False)
    return [(version, end) for version, end, before in spans if end > before]


def to_sample(response: Response, decode: Decode) -> Sample:
    """As the trainer knows it."""
    return Sample(
        tokens=response.tokens,
        logprobs=response.logprobs,
        text=decode(response.tokens),
        finished=response.finish_reason == "stop",
        weight_version=min(response.weight_versions),
        weight_spans=list(zip(response.weight_versions, response.version_ends, strict=False)),
        routed_experts=response.routed_experts,
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
    if response.finish_reason == "abort" and not tokens:
        return
    if not tokens or not response.weight_versions:
        raise GarbageError(f"a response of {len(tokens)} tokens of weights {response.weight_versions}")
    if response.mask or response.answer_from:
        raise GarbageError("a response with tokens that it says are a tool's")
    if max(response.logprobs) > LARGEST_LOGPROB:
        raise GarbageError(f"a log-probability of {max(response.logprobs)}")
    ends_well = {
        "stop": tokens[-1] in request.sampling.stop_token_ids,
        "length": len(tokens) == longest,
        "abort": tokens[-1] not in request.sampling.stop_token_ids and len(tokens) < longest,
    }
    if not ends_well[response.finish_reason] or len(tokens) > longest:
        raise GarbageError(
            f"a response of {len(tokens)} tokens (at most {longest}) that ended by {response.finish_reason!r} "
            f"with token {tokens[-1]}"
        )
    ends = response.version_ends or [len(tokens)]
    if len(ends) != len(response.weight_versions) or sorted(ends) != ends or ends[-1] != len(tokens):
        raise GarbageError(f"weights {response.weight_versions} up to tokens {ends} of {len(tokens)}")
    if request.sampling.routed_experts:
        fed = len(request.prompts[response.prompt]) + len(tokens) - 1
        if response.routed_experts is None or len(response.routed_experts) != fed:
            raise GarbageError(f"a sample without the experts of the {fed} tokens that the engine was fed")
    oldest, newest = min(response.weight_versions), max(response.weight_versions)
    if oldest < first or newest > last:
        raise GarbageError(f"a sample of weights {oldest} to {newest}, but it was given {first} to {last}")
