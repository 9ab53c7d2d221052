"""What the engine core sends, against what vLLM's scheduler says at each step. Spans of weights: `test_flow.py`."""

import random
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import LogprobsLists
from vllm.v1.request import RequestStatus

from megatron_r1.rollout.held_outputs import LARGEST, AsyncHolding, Holding, scheduler

WHOLE = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY)
PIECES = SamplingParams(output_kind=RequestOutputKind.DELTA)
WATCHED = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, stop=["###"], detokenize=True)


def output(name: str, token: int, last: bool = False) -> EngineCoreOutput:
    """What a step says of a request: one token, its log-probability, the experts that it went to."""
    logprobs = LogprobsLists(np.array([[token]]), np.array([[-token / 8]], np.float32), np.array([token + 1]))
    finish = FinishReason.LENGTH if last else None
    return EngineCoreOutput(name, [token], logprobs, finish_reason=finish, routed_experts=np.array([[token]], np.uint8))


class Core:
    """vLLM's scheduler as a script: what its next steps say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **requests: SamplingParams) -> None:
        self.said: dict[int, list[EngineCoreOutput]] = {}
        self.busy = True
        monkeypatch.setattr(Scheduler, "__init__", lambda core: None)
        monkeypatch.setattr(Scheduler, "update_from_output", lambda *_: self._step())
        monkeypatch.setattr(Scheduler, "has_requests", lambda _: self.busy)
        monkeypatch.setattr(
            Scheduler, "finish_requests", lambda core, names, status: [SimpleNamespace(request_id=n) for n in names]
        )
        self.holding: Any = Holding()
        self.holding.requests = {name: SimpleNamespace(sampling_params=params) for name, params in requests.items()}
        self.holding._pause_state = PauseState.UNPAUSED

    def _step(self) -> dict[int, EngineCoreOutputs]:
        said, self.said = self.said, {}
        return {client: EngineCoreOutputs(outputs=outputs) for client, outputs in said.items()}

    def step(self, *outputs: EngineCoreOutput, client: int = 0) -> dict[str, list[list[int]]]:
        """Tokens of each output that is sent, by request."""
        self.said = {client: list(outputs)} if outputs else {}
        sent: dict[str, list[list[int]]] = defaultdict(list)
        for to, message in self.holding.update_from_output(None, None).items():
            assert to == client
            assert message.outputs, "a message that says nothing costs two processes' time"
            for one in message.outputs:
                tokens = one.new_token_ids
                assert one.new_logprobs.logprobs[:, 0].tolist() == [-token / 8 for token in tokens]
                assert one.new_logprobs.logprob_token_ids[:, 0].tolist() == tokens
                assert one.new_logprobs.sampled_token_ranks.tolist() == [token + 1 for token in tokens]
                assert one.routed_experts[:, 0].tolist() == tokens
                sent[one.request_id].append(tokens)
        return dict(sent)


def test_a_response_is_sent_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core(monkeypatch, a=WHOLE, b=WHOLE)
    assert core.step(output("a", 1), output("b", 5)) == {}
    assert core.step(output("a", 2), output("b", 6, last=True)) == {"b": [[5, 6]]}
    assert core.step(output("a", 3, last=True)) == {"a": [[1, 2, 3]]}
    assert core.step() == {}


def test_one_token_is_a_response_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Core(monkeypatch, a=WHOLE).step(output("a", 1, last=True)) == {"a": [[1]]}


@pytest.mark.parametrize("params", [PIECES, WATCHED])
def test_who_reads_along_gets_every_token(monkeypatch: pytest.MonkeyPatch, params: SamplingParams) -> None:
    core = Core(monkeypatch, a=params, b=WHOLE)
    assert core.step(output("a", 1), output("b", 4)) == {"a": [[1]]}
    assert core.step(output("a", 2), output("b", 5)) == {"a": [[2]]}


def test_a_long_response_is_sent_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    core, sent = Core(monkeypatch, a=WHOLE), []
    for token in range(2 * LARGEST + 3):
        sent += core.step(output("a", token, last=token == 2 * LARGEST + 2)).get("a", [])
    assert [len(part) for part in sent] == [LARGEST, LARGEST, 3]
    assert [token for part in sent for token in part] == list(range(2 * LARGEST + 3))


def test_a_pause_waits_until_nothing_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights change once it is there, and the version of a message holds for all that it says."""
    core = Core(monkeypatch, a=WHOLE, b=WHOLE)
    core.step(output("a", 1), output("b", 5), client=1)
    core.busy, core.holding._pause_state = False, PauseState.PAUSED_ALL
    assert core.holding.has_requests()
    assert core.step(client=1) == {"a": [[1]], "b": [[5]]}
    assert not core.holding.has_requests()
    core.busy, core.holding._pause_state = True, PauseState.UNPAUSED
    assert core.step(output("a", 2), client=1) == {}
    assert core.step(output("a", 3, last=True), client=1) == {"a": [[2, 3]]}


def test_what_is_aborted_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core(monkeypatch, a=WHOLE)
    core.step(output("a", 1))
    core.holding.finish_requests(["a"], RequestStatus.FINISHED_ABORTED)
    core.holding._pause_state, core.busy = PauseState.PAUSED_ALL, False
    assert not core.holding.has_requests()
    assert core.step() == {}


def test_nothing_is_lost_or_told_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(5)
    names = [f"request-{number}" for number in range(40)]
    core = Core(monkeypatch, **{name: rng.choice([WHOLE, PIECES]) for name in names})
    lengths = {name: rng.randint(1, 3 * LARGEST) for name in names}
    told: dict[str, list[int]] = defaultdict(list)
    step = 0
    while any(len(told[name]) < lengths[name] for name in names):
        going = [name for name in names if step < lengths[name]]
        core.holding._pause_state = rng.choice([PauseState.UNPAUSED, PauseState.PAUSED_ALL])
        sent = core.step(*(output(name, step % 256, last=step == lengths[name] - 1) for name in going))
        for name, parts in sent.items():
            told[name] += [token for part in parts for token in part]
        step += 1
    assert told == {name: [token % 256 for token in range(lengths[name])] for name in names}


def test_vllm_that_schedules_ahead_goes_on_doing_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "__init__", lambda core, vllm_config: None)
    monkeypatch.setattr("vllm.v1.core.sched.async_scheduler.AsyncScheduler.__init__", lambda core, vllm_config: None)
    for ahead, kind in ((True, AsyncHolding), (False, Holding)):
        config: Any = SimpleNamespace(scheduler_config=SimpleNamespace(async_scheduling=ahead))
        assert type(scheduler(config)) is kind
