"""Runs inside vLLM's engine core: a scheduler that says what was sampled once in a while, not after each token.

vLLM sends every token of every request to its HTTP server by itself, for clients that read along, and both processes
pack and unpack it, in time that the model does not get. Whoever asks for finished responses alone (`batch_route.py`
does) needs none of that: their tokens are held back, and sent when the response ends or `LARGEST` are held.

What is sent at once is named by the version of the weights at that moment. So a pause, without which weights never
change, has all that is held sent before it is complete.

vLLM loads it by `--scheduler-cls megatron_r1.rollout.held_outputs.scheduler`.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from vllm.config import VllmConfig
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

LARGEST = 64
"""Outputs of one request that are held at most: memory, and messages, for very long responses."""


class Holding(Scheduler):
    """See the top of the file."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._held: dict[str, list[EngineCoreOutput]] = {}
        self._clients: dict[str, int] = {}
        """Of the requests that outputs are held of, which server has asked."""

    def has_requests(self) -> bool:
        """A step that computes nothing sends what is held when a pause begins, and ends the pause's wait."""
        return super().has_requests() or (bool(self._held) and self.pause_state is PauseState.PAUSED_ALL)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        said = super().update_from_output(scheduler_output, model_runner_output)
        for client, message in said.items():
            message.outputs = [sent for output in message.outputs for sent in self._hold(output, client)]
        if self.pause_state is PauseState.PAUSED_ALL:
            for name in list(self._held):
                message = said.setdefault(self._clients[name], EngineCoreOutputs())
                message.outputs.append(self._take(name))
        return {client: message for client, message in said.items() if _says_something(message)}

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        gone = super().finish_requests(request_ids, finished_status)
        for request in gone:
            self._held.pop(request.request_id, None)
            self._clients.pop(request.request_id, None)
        return gone

    def _hold(self, output: EngineCoreOutput, client: int) -> list[EngineCoreOutput]:
        """What is sent now of one request's output."""
        name = output.request_id
        if name in self._held:
            self._held[name].append(output)
        elif output.finish_reason is None and _mergeable(output) and self._wants_it_whole(name):
            self._held[name], self._clients[name] = [output], client
        else:
            return [output]
        whole = output.finish_reason is not None or len(self._held[name]) >= LARGEST
        return [self._take(name)] if whole else []

    def _take(self, name: str) -> EngineCoreOutput:
        del self._clients[name]
        return merged(self._held.pop(name))

    def _wants_it_whole(self, name: str) -> bool:
        params = self.requests[name].sampling_params
        if params is None or params.stop:  # such texts are looked for by the HTTP server, which then ends the request
            return False
        return params.output_kind is RequestOutputKind.FINAL_ONLY


class AsyncHolding(Holding, AsyncScheduler):
    """Where vLLM schedules a step while the one before runs, as it does on GPU."""


def scheduler(vllm_config: VllmConfig, **options: Any) -> Holding:
    """What vLLM calls as a class."""
    chosen = AsyncHolding if vllm_config.scheduler_config.async_scheduling else Holding
    return chosen(vllm_config=vllm_config, **options)


def merged(parts: list[EngineCoreOutput]) -> EngineCoreOutput:
    """One output that says what consecutive ones of a request have said."""
    last = parts[-1]
    if len(parts) > 1:
        last.new_token_ids = [token for part in parts for token in part.new_token_ids]
        logprobs = [part.new_logprobs for part in parts if part.new_logprobs is not None]
        if logprobs:
            columns = zip(*((part[0], part[1], part[2]) for part in logprobs), strict=True)
            last.new_logprobs = LogprobsLists(*map(np.concatenate, columns))
        experts = [part.routed_experts for part in parts if part.routed_experts is not None]
        last.routed_experts = np.concatenate(experts) if experts else None
        last.events = [event for part in parts for event in part.events or ()] or None
        last.prefill_stats = next((part.prefill_stats for part in parts if part.prefill_stats is not None), None)
    return last


def _mergeable(output: EngineCoreOutput) -> bool:
    """Whether it holds nothing that `merged` does not know."""
    rare = (
        output.pooling_output,
        output.new_prompt_logprobs_tensors,
        output.prompt_token_id_logprobs,
        output.new_sampling_mask,
    )
    return all(value is None for value in rare)


def _says_something(message: EngineCoreOutputs) -> bool:
    return bool(message.outputs or message.finished_requests) or message.scheduler_stats is not None
