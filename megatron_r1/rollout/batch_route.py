"""Runs inside the vLLM server: one route that takes a whole batch and answers it reproducibly.

Floating-point sums depend on which requests share a scheduler step, so responses repeat bitwise only if every step
holds the same requests in the same order. Requests that arrive one by one over HTTP enter the scheduler at the mercy
of timing. This route holds the scheduler (vLLM's own pause), empties the prefix cache (what an earlier batch left in it
would change which tokens are computed), queues the batch in order, and lets go.

vLLM loads it by `--middleware megatron_r1.rollout.batch_route.BatchRoute`.

Request, all lists of one length or shared by the batch::

    {"prompts": [[1, 5, 7], ...], "seeds": [[11, 12], [21, 22], ...], "temperature": 1.0, "top_p": 1.0,
     "max_tokens": [64, ...], "stop_token_ids": [2]}

Answer: a line of JSON for each prompt as soon as all its responses are there, in any order, with one object for each
seed; a line with an `error` instead if something went wrong::

    {"prompt": 0, "responses": [{"tokens": [8, 2], "logprobs": [-0.5, -0.1], "finish_reason": "stop",
                                 "weight_versions": ["0"]}, ...]}
"""

import asyncio
import json
import traceback
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm import SamplingParams
from vllm.inputs.engine import tokens_input
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import RequestOutputCollector

from megatron_r1.rollout.engine import SAMPLE_PATH


class BatchRoute:
    """ASGI middleware that answers `POST /megatron_r1/sample` and passes everything else on."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.lock = asyncio.Lock()
        self.batches = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != SAMPLE_PATH:
            await self.app(scope, receive, send)
            return
        request = json.loads(await Request(scope, receive).body())
        lines = self._lines(scope["app"].state.engine_client, request)
        await StreamingResponse(lines, media_type="application/x-ndjson")(scope, receive, send)

    async def _lines(self, engine: AsyncLLM, request: dict[str, Any]) -> AsyncIterator[str]:
        try:
            async with self.lock:
                self.batches += 1
                async for answer in sample(engine, request, f"batch-{self.batches}"):
                    yield json.dumps(answer) + "\n"
        except Exception as error:  # whatever vLLM raises goes to the trainer, which shows it to the user
            traceback.print_exc()
            yield json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n"


async def sample(engine: AsyncLLM, request: dict[str, Any], name: str) -> AsyncIterator[dict[str, Any]]:
    """Queue the whole batch while the scheduler is held, then yield each prompt's responses as they are complete."""
    await engine.pause_generation(mode="keep", clear_cache=True)
    try:
        queued = [
            [await _queue(engine, request, index, seed, f"{name}-{index}-{seed}") for seed in seeds]
            for index, seeds in enumerate(request["seeds"])
        ]
    finally:
        await engine.resume_generation()
    groups = [asyncio.create_task(_group(index, collectors)) for index, collectors in enumerate(queued)]
    try:
        for complete in asyncio.as_completed(groups):
            yield await complete
    finally:
        for group in groups:
            group.cancel()


async def _group(index: int, collectors: list[RequestOutputCollector]) -> dict[str, Any]:
    return {"prompt": index, "responses": [_answer(await _finished(collector)) for collector in collectors]}


async def _queue(engine: AsyncLLM, request: dict[str, Any], index: int, seed: int, name: str) -> RequestOutputCollector:
    params = SamplingParams(
        temperature=request["temperature"],
        top_p=request["top_p"],
        max_tokens=request["max_tokens"][index],
        stop_token_ids=request["stop_token_ids"],
        seed=seed,
        logprobs=0,  # of the sampled token only
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,  # made for this request alone; a deep copy of each costs as much as the rest of the queueing
    )
    return await engine.add_request(name, tokens_input(request["prompts"][index]), params)


async def _finished(collector: RequestOutputCollector) -> RequestOutput:
    while not (output := await collector.get()).finished:
        pass
    assert isinstance(output, RequestOutput)
    return output


def _answer(output: RequestOutput) -> dict[str, Any]:
    completion = output.outputs[0]
    return {
        "tokens": list(completion.token_ids),
        "logprobs": completion.logprobs.logprobs,
        "finish_reason": completion.finish_reason,
        "weight_versions": [span.version for span in completion.weight_versions],
    }
