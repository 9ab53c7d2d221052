"""Runs inside the vLLM server: one route that takes many prompts and answers sample by sample.

`"together": true` answers reproducibly. Floating-point sums depend on which requests share a scheduler step, so
responses repeat bitwise only if every step holds the same requests in the same order. Requests that arrive one by one
over HTTP enter the scheduler at the mercy of timing. So this route holds the scheduler (vLLM's own pause), empties the
prefix cache (what an earlier batch left in it would change which tokens are computed), queues the batch in order, and
lets go. With `false` the prompts join whatever runs, and find their prefixes in the cache.

vLLM loads it by `--middleware megatron_r1.rollout.batch_route.BatchRoute`.

Request, all lists of one length or shared by the batch::

    {"together": true, "prompts": [[1, 5, 7], ...], "seeds": [[11, 12], [21, 22], ...], "temperature": 1.0,
     "top_p": 1.0, "max_tokens": [64, ...], "stop_token_ids": [2]}

Answer: a line of JSON for each seed as soon as its response is there, in any order. An empty object says that the
engine core is alive and has nothing ready; a line with an `error`, the last one, that something went wrong::

    {"prompt": 0, "sample": 1, "tokens": [8, 2], "logprobs": [-0.5, -0.1], "finish_reason": "stop",
     "weight_versions": ["0"], "version_ends": [2]}

With `"routed_experts": true` each has these, too (`routed_experts.py`).

What a client that hangs up has left unfinished is aborted.
"""

import asyncio
import json
import traceback
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm import SamplingParams
from vllm.inputs.engine import tokens_input
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import RequestOutputCollector

from megatron_r1.rollout.engine import SAMPLE_PATH
from megatron_r1.rollout.routed_experts import encode

BEAT_SECONDS = 5.0
"""Without a response before the engine core is asked for a sign of life."""
NOT_RECORDING = (
    "rollout.routing_replay needs engines that say which experts tokens went to: start this one with "
    "--enable-return-routed-experts"
)
GATHER_SECONDS = 0.02
"""Between two chunks of an answer. Each wakes two processes, on CPU at the cost of the engine's threads."""


class BatchRoute:
    """ASGI middleware that answers `POST /megatron_r1/sample` and passes everything else on."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.lock = asyncio.Lock()
        self.requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != SAMPLE_PATH:
            await self.app(scope, receive, send)
            return
        request = json.loads(await Request(scope, receive).body())
        engine = scope["app"].state.engine_client
        if request.get("routed_experts") and not engine.vllm_config.aux_output_config.enable_return_routed_experts:
            await PlainTextResponse(NOT_RECORDING, 400)(scope, receive, send)
            return
        lines = self._lines(engine, request)
        await StreamingResponse(lines, media_type="application/x-ndjson")(scope, receive, send)

    async def _lines(self, engine: AsyncLLM, request: dict[str, Any]) -> AsyncIterator[str]:
        lines: asyncio.Queue[str | None] = asyncio.Queue()
        # A task of its own, because whatever awaits anything after its client has hung up is cancelled again.
        answering = asyncio.create_task(self._answer(engine, request, lines))
        try:
            line = await lines.get()
            while line is not None:
                chunk = [line]
                while not lines.empty() and (line := lines.get_nowait()) is not None:
                    chunk.append(line)
                yield "".join(chunk)
                if line is not None:
                    await asyncio.sleep(GATHER_SECONDS)
                    line = await lines.get()
        finally:
            answering.cancel()

    async def _answer(self, engine: AsyncLLM, request: dict[str, Any], lines: "asyncio.Queue[str | None]") -> None:
        self.requests += 1
        turn: AbstractAsyncContextManager[None] = self.lock if request["together"] else nullcontext()
        try:
            async with turn:
                async for answer in sample(engine, request, f"request-{self.requests}"):
                    lines.put_nowait(json.dumps(answer) + "\n")
        except Exception as error:  # whatever vLLM raises goes to the trainer, which shows it to the user
            traceback.print_exc()
            lines.put_nowait(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        lines.put_nowait(None)


async def sample(engine: AsyncLLM, request: dict[str, Any], name: str) -> AsyncIterator[dict[str, Any]]:
    """Queue all prompts, then yield each response as it is complete; {} = the core is alive."""
    unfinished: dict[asyncio.Task[dict[str, Any]], str] = {}
    done: asyncio.Queue[asyncio.Task[dict[str, Any]]] = asyncio.Queue()
    try:
        if request["together"]:
            # `pause_generation` without its wait of 20 ms for answers to earlier requests.
            await engine.engine_core.pause_scheduler_async(mode="keep", clear_cache=True)
        try:
            for index, seeds in enumerate(request["seeds"]):
                for number, seed in enumerate(seeds):
                    collector = await _queue(engine, request, index, seed, f"{name}-{index}-{number}")
                    task = asyncio.create_task(_finished(index, number, collector))
                    task.add_done_callback(done.put_nowait)
                    unfinished[task] = collector.request_id
        finally:
            if request["together"]:
                await engine.resume_generation()
        while unfinished:
            try:
                task = await asyncio.wait_for(done.get(), BEAT_SECONDS)
            except TimeoutError:
                await engine.is_paused()  # the core answers between two steps; one that hangs does not
                yield {}
                continue
            del unfinished[task]
            yield task.result()
    finally:
        for task in unfinished:
            task.cancel()
        if unfinished and not engine.errored:
            await engine.abort(list(unfinished.values()), internal=True)


async def _finished(index: int, number: int, collector: RequestOutputCollector) -> dict[str, Any]:
    while not (output := await collector.get()).finished:
        pass
    assert isinstance(output, RequestOutput)
    completion = output.outputs[0]
    return {
        "prompt": index,
        "sample": number,
        "tokens": list(completion.token_ids),
        "logprobs": completion.logprobs.logprobs,
        "finish_reason": completion.finish_reason,
        "weight_versions": [span.version for span in completion.weight_versions],
        "version_ends": [span.end for span in completion.weight_versions],
        **({} if completion.routed_experts is None else {"routed_experts": encode(completion.routed_experts)}),
    }


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
