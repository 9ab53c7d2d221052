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

Answer: a line of JSON for each seed soon after its response is there, in any order. An empty object says that the
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
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from copy import copy
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm import SamplingParams
from vllm.inputs.engine import tokens_input
from vllm.outputs import PoolingRequestOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
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
        chunks = self._chunks(engine, request)
        await StreamingResponse(chunks, media_type="application/x-ndjson")(scope, receive, send)

    async def _chunks(self, engine: AsyncLLM, request: dict[str, Any]) -> AsyncIterator[bytes]:
        chunks: asyncio.Queue[bytes | None] = asyncio.Queue()
        # A task of its own, because whatever awaits anything after its client has hung up is cancelled again.
        answering = asyncio.create_task(self._answer(engine, request, chunks))
        try:
            while (chunk := await chunks.get()) is not None:
                yield chunk
        finally:
            answering.cancel()

    async def _answer(self, engine: AsyncLLM, request: dict[str, Any], chunks: "asyncio.Queue[bytes | None]") -> None:
        self.requests += 1
        turn: AbstractAsyncContextManager[None] = self.lock if request["together"] else nullcontext()
        try:
            async with turn:
                async for answers in sample(engine, request, f"request-{self.requests}"):
                    chunks.put_nowait(b"".join(msgspec.json.encode(answer) + b"\n" for answer in answers))
        except Exception as error:  # whatever vLLM raises goes to the trainer, which shows it to the user
            traceback.print_exc()
            chunks.put_nowait(msgspec.json.encode({"error": f"{type(error).__name__}: {error}"}) + b"\n")
        chunks.put_nowait(None)


class Finished(RequestOutputCollector):
    """Where vLLM puts the responses to all samples of one request as they are complete."""

    def __init__(self) -> None:
        super().__init__(RequestOutputKind.FINAL_ONLY, "")
        self.unfinished: dict[str, tuple[str, int, int]] = {}
        """vLLM's name of a sample, prompt and number, by our name."""
        self.all_there = asyncio.Event()
        self._outputs: list[RequestOutput] = []
        self._error: Exception | None = None

    def put(self, output: RequestOutput | PoolingRequestOutput | Exception) -> None:
        if isinstance(output, Exception):
            self._error = output
            self.all_there.set()
        elif isinstance(output, RequestOutput) and output.finished:
            self._outputs.append(output)
            if len(self._outputs) == len(self.unfinished):
                self.all_there.set()
        self.ready.set()

    async def take(self) -> list[dict[str, Any]]:
        """What has come since the last call, soon after the first of it.

        Raises:
            TimeoutError: nothing has.
            Exception: what vLLM says has gone wrong.
        """
        async with asyncio.timeout(BEAT_SECONDS):
            await self.ready.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(GATHER_SECONDS):
                await self.all_there.wait()
        self.ready.clear()
        self.all_there.clear()  # of those that were queued by then
        if self._error:
            raise self._error
        outputs, self._outputs = self._outputs, []
        return [answer(output, *self.unfinished.pop(output.request_id)[1:]) for output in outputs]


async def sample(engine: AsyncLLM, request: dict[str, Any], name: str) -> AsyncIterator[list[dict[str, Any]]]:
    """Queue all prompts, then yield responses as they are complete; {} = the core is alive."""
    finished = Finished()
    try:
        if request["together"]:
            # `pause_generation` without its wait of 20 ms for answers to earlier requests.
            await engine.engine_core.pause_scheduler_async(mode="keep", clear_cache=True)
        try:
            await queue(engine, request, name, finished)
        finally:
            if request["together"]:
                await engine.resume_generation()
        while finished.unfinished:
            try:
                yield await finished.take()
            except TimeoutError:
                await engine.is_paused()  # the core answers between two steps; one that hangs does not
                yield [{}]
    finally:
        if finished.unfinished and not engine.errored:
            await engine.abort([named for named, _, _ in finished.unfinished.values()], internal=True)


async def queue(engine: AsyncLLM, request: dict[str, Any], name: str, finished: Finished) -> None:
    """What `AsyncLLM.add_request` does, but once a prompt where nothing depends on the sample."""
    if engine.errored:
        raise EngineDeadError
    tasks = await engine.get_supported_tasks()
    for index, (prompt, seeds) in enumerate(zip(request["prompts"], request["seeds"], strict=True)):
        params = SamplingParams(
            temperature=request["temperature"],
            top_p=request["top_p"],
            max_tokens=request["max_tokens"][index],
            stop_token_ids=request["stop_token_ids"],
            seed=seeds[0],
            logprobs=0,  # of the sampled token only
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,  # made for this request alone
        )
        first = engine.input_processor.process_inputs(name, tokens_input(prompt), params, supported_tasks=tasks)
        for number, seed in enumerate(seeds):
            one = copy(first)
            one.sampling_params = copy(first.sampling_params)
            one.sampling_params.seed = seed
            one.request_id = named = f"{name}-{index}-{number}"
            engine.input_processor.assign_request_id(one)
            finished.unfinished[named] = one.request_id, index, number
            engine.output_processor.add_request(one, None, queue=finished)
            await engine.engine_core.add_request_async(one)


def answer(output: RequestOutput, prompt: int, sample: int) -> dict[str, Any]:
    """One line of the answer."""
    completion = output.outputs[0]
    return {
        "prompt": prompt,
        "sample": sample,
        "tokens": list(completion.token_ids),
        "logprobs": completion.logprobs.logprobs,
        "finish_reason": completion.finish_reason,
        "weight_versions": [span.version for span in completion.weight_versions],
        "version_ends": [span.end for span in completion.weight_versions],
        **({} if completion.routed_experts is None else {"routed_experts": encode(completion.routed_experts)}),
    }
