"""Groups without end: who is told what in which order, over new weights, lost engines, and batches beside them."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_r1.config.asynchrony import WeightsChange
from megatron_r1.errors import DataError, EngineError
from megatron_r1.rollout.fan_out import TransferError
from megatron_r1.rollout.fleet import Fleet
from megatron_r1.rollout.flow import Complete, Event, Failed, Flow, Newer, Sent, Weightless
from megatron_r1.rollout.member import Member
from megatron_r1.rollout.responses import Response
from megatron_r1.rollout.server import EngineLostError, WeightsNeededError
from megatron_r1.seeds import stream_seed
from megatron_r1.types import Sample
from megatron_r1.weight_sync.named_tensors import NamedTensors
from megatron_r1.weight_sync.shared_memory import SharedMemorySync
from tests.rollout.scripted_server import response
from tests.rollout.test_engine_faults import PROMPTS, Open, expected, opened, push, tokens, wait_for  # noqa: F401
from tests.rollout.test_fleet import make_prompts
from tests.rollout.test_passed_weights import send

N = 3


class Told:
    """What a flow has said so far."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.events: list[Event] = []

    def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            found = self.flow.events()
            assert found, "the flow is closed"
            self.events += found

    @property
    def complete(self) -> dict[str, list[Sample]]:
        return {event.key: event.samples for event in self.events if isinstance(event, Complete)}

    @property
    def newest(self) -> int:
        return max((event.version for event in self.events if isinstance(event, Newer)), default=0)


@contextmanager
def flowing(fleet: Fleet, weights_change: WeightsChange = "in_flight") -> Iterator[Told]:
    flow = fleet.flow(weights_change)
    try:
        yield Told(flow)
    finally:
        flow.close()


def seeds(number: int) -> list[int]:
    return [100 * number + sample for sample in range(N)]


def submit(flow: Flow, *numbers: int, at_least: int = 0) -> None:
    for number in numbers:
        flow.submit(f"data:{number}", [1, number + 3], seeds(number), at_least)


def test_each_group_is_sent_then_complete_and_has_its_samples(opened: Open) -> None:  # noqa: F811
    with flowing(opened(dispatch="continuous")) as told:
        submit(told.flow, *range(8))
        told.until(lambda: len(told.complete) == 8)
    for number in range(8):
        mine = [type(event) for event in told.events if getattr(event, "key", "") == f"data:{number}"]
        assert mine == [Sent, Complete]
        answers = [sample.tokens for sample in told.complete[f"data:{number}"]]
        assert answers == [response(seed, 0, 50)["tokens"] for seed in seeds(number)]


def test_a_group_for_newer_weights_waits_for_them(opened: Open, tmp_path: Path) -> None:  # noqa: F811
    fleet = opened(dispatch="continuous")
    with flowing(fleet) as told:
        submit(told.flow, 0, at_least=1)
        submit(told.flow, 1)
        told.until(lambda: "data:1" in told.complete)
        assert "data:0" not in told.complete
        push(fleet, tmp_path, 1)
        told.until(lambda: "data:0" in told.complete)
    newer, sent = told.events.index(Newer(1)), told.events.index(Sent("data:0", 1))
    assert newer < sent
    assert {sample.weight_version for sample in told.complete["data:0"]} == {1}


def test_in_flight_a_group_goes_on_with_new_weights(opened: Open, tmp_path: Path) -> None:  # noqa: F811
    fleet = opened(engines=1, dispatch="continuous")
    held = fleet.holds(0, after=2)
    with flowing(fleet) as told:
        submit(told.flow, 0)
        wait_for(lambda: len(told.flow.had().get("data:0", [])) == 2)
        push(fleet, tmp_path, 1)
        held.unlink()
        told.until(lambda: bool(told.complete))
    assert [sample.weight_version for sample in told.complete["data:0"]] == [0, 0, 1]


def begun_by_old_weights(number: int, sample: int) -> list[int]:
    """What the scripted engine has of a sample when it is cut."""
    whole: list[int] = response(seeds(number)[sample], 0, 50)["tokens"]
    return whole[: len(whole) // 2]


def test_partial_rollouts_go_on_where_they_were_with_new_weights(opened: Open, tmp_path: Path) -> None:  # noqa: F811
    """The engine is at the first sample of each of two groups; others of theirs, and the third group, are not begun."""
    fleet = opened(engines=1, dispatch="continuous", max_num_seqs=N)
    fleet.breaks(0, "slow", after=-1, seconds=600.0, times=2)
    with flowing(fleet, "partial_rollouts") as told:
        submit(told.flow, 0, 1, 2)
        told.until(lambda: {Sent("data:0", 0), Sent("data:1", 0)} <= set(told.events))
        wait_for(lambda: len(fleet.asked(0)) == 2)
        push(fleet, tmp_path, 1)
        told.until(lambda: len(told.complete) == 3)
    for number in (0, 1):
        first, *others = told.complete[f"data:{number}"]
        begun = begun_by_old_weights(number, 0)
        again = stream_seed(seeds(number)[0], "resumed", len(begun))
        assert first.tokens == begun + response(again, 1, 50 - len(begun))["tokens"]
        assert len(first.logprobs) == len(first.tokens)
        assert (first.weight_version, first.weight_spans) == (0, [(0, len(begun)), (1, len(first.tokens))])
        assert [one.tokens for one in others] == [response(seed, 1, 50)["tokens"] for seed in seeds(number)[1:]]
        assert {one.weight_version for one in others} == {1}
        [request] = [one for one in fleet.requests(0)[2:] if one["prompts"][0][:2] == [1, number + 3]]
        assert request["prompts"] == [[1, number + 3, *begun], [1, number + 3], [1, number + 3]]
    assert {one.weight_version for one in told.complete["data:2"]} == {1}
    figures = fleet.figures()
    assert (figures["engines_lost"], figures["samples_resumed"], figures["samples_again"]) == (0, 2, 0)


def test_beginnings_outlive_their_engine_and_their_flow(opened: Open, tmp_path: Path) -> None:  # noqa: F811
    """The engine gives back what it has, dies while it loads, and is asked again; then another flow goes on."""
    fleet = opened(engines=1, dispatch="continuous", max_num_seqs=N)
    slow = {"kind": "slow", "after": -1, "seconds": 600.0}
    fleet.breaks(0, **slow, then={"kind": "die", "then": slow | {"times": 2}})  # twice: the load counts, too
    begun = begun_by_old_weights(0, 0)
    with flowing(fleet, "partial_rollouts") as told:
        submit(told.flow, 0)
        wait_for(lambda: len(fleet.asked(0)) == 1)
        assert told.flow.had() == {}
        push(fleet, tmp_path, 1)
        wait_for(lambda: len(fleet.asked(0)) == 2)
        had = told.flow.had()
        told.flow.cancel(["data:0"])
    assert fleet.figures()["engines_lost"] == 1
    [response_] = had["data:0"]
    assert (response_.sample, response_.tokens, response_.weight_versions) == (0, begun, [0])
    with flowing(fleet, "partial_rollouts") as told:
        told.flow.submit("data:0", [1, 3], seeds(0), 1, had=had["data:0"])
        told.until(lambda: bool(told.complete))
    first, *others = told.complete["data:0"]
    again = stream_seed(seeds(0)[0], "resumed", len(begun))
    assert first.tokens == begun + response(again, 1, 50 - len(begun))["tokens"]
    assert first.weight_spans == [(0, len(begun)), (1, len(first.tokens))]
    assert [one.tokens for one in others] == [response(seed, 1, 50)["tokens"] for seed in seeds(0)[1:]]


def test_what_is_complete_is_there_until_the_next_events_and_is_not_asked_again(opened: Open) -> None:  # noqa: F811
    """A caller that keeps it and tells another flow of it is told that it is complete; the engine is not asked."""
    fleet = opened(engines=1, dispatch="continuous")
    with flowing(fleet) as told:
        submit(told.flow, 0)
        told.until(lambda: bool(told.complete))
        had = told.flow.had()
        submit(told.flow, 1)
        told.until(lambda: len(told.complete) == 2)
        assert list(told.flow.had()) == ["data:1"], "the caller is done with the other"
    assert [one.tokens for one in had["data:0"]] == [response(seed, 0, 50)["tokens"] for seed in seeds(0)]
    with flowing(fleet) as again:
        again.flow.submit("data:0", [1, 3], seeds(0), 1, had=had["data:0"])
        again.until(lambda: bool(again.complete))
    assert again.complete["data:0"] == told.complete["data:0"]
    assert len(fleet.asked(0)) == 2


@pytest.mark.parametrize(("room", "asked"), [(4, False), (3, True)])
def test_samples_of_an_earlier_run_count_if_they_fit(
    opened: Open,  # noqa: F811
    room: int,
    asked: bool,
) -> None:
    """A whole one of four tokens is one where there is room for four; for three, the group is begun anew."""
    fleet = opened(engines=1, dispatch="continuous", max_tokens=room)
    had = [
        Response(
            prompt=0,
            sample=sample,
            tokens=[0, 9, 9, 9],
            logprobs=[-0.5] * 4,
            finish_reason="length",
            weight_versions=[0],
        )
        for sample in range(N)
    ]
    with flowing(fleet) as told:
        told.flow.submit("data:0", [1, 3], seeds(0), 0, had=had)
        told.until(lambda: bool(told.complete))
    assert bool(fleet.asked(0)) == asked
    assert all(len(sample.tokens) <= room for sample in told.complete["data:0"])


def test_at_group_borders_the_push_returns_and_running_groups_keep_their_weights(
    opened: Open,  # noqa: F811
    tmp_path: Path,
) -> None:
    fleet = opened(engines=1, dispatch="continuous", max_num_seqs=N)
    held = fleet.holds(0, times=2)
    with flowing(fleet, "at_group_borders") as told:
        submit(told.flow, 0, 1, 2)  # one that runs, one that the engine has in reserve, one that waits
        told.until(lambda: Sent("data:1", 0) in told.events)
        push(fleet, tmp_path, 1)
        push(fleet, tmp_path, 2)
        assert told.flow.had() == {}, "nothing is complete"
        held.unlink()
        told.until(lambda: len(told.complete) == 3)
    versions = {key: [sample.weight_version for sample in samples] for key, samples in told.complete.items()}
    assert versions == {"data:0": [0] * N, "data:1": [0] * N, "data:2": [2] * N}
    order = [event for event in told.events if isinstance(event, Newer | Sent)]
    assert order[2:] == [Newer(2), Sent("data:2", 2)], "the weights between were never needed"


def test_an_engine_that_dies_costs_no_group(opened: Open, tmp_path: Path) -> None:  # noqa: F811
    fleet = opened(dispatch="continuous")
    fleet.breaks(0, "die", after=2)
    with flowing(fleet) as told:
        submit(told.flow, *range(8))
        told.until(lambda: len(told.complete) == 8)
        assert Counter(event.key for event in told.events if isinstance(event, Complete)).most_common(1)[0][1] == 1
        push(fleet, tmp_path, 1)
        wait_for(lambda: fleet.figures()["engines_ready"] == 2)
        submit(told.flow, *range(8, 12), at_least=1)
        told.until(lambda: len(told.complete) == 12)
    assert fleet.figures()["engines_lost"] == 1


def test_what_is_cancelled_is_not_answered(opened: Open) -> None:  # noqa: F811
    fleet = opened(engines=1, dispatch="continuous", max_num_seqs=N)
    held = fleet.holds(0, times=2)
    with flowing(fleet) as told:
        submit(told.flow, 0, 1, 2, 3)
        wait_for(lambda: len(fleet.asked(0)) == 2)
        told.flow.cancel(["data:0", "data:2", "data:7"])
        told.until(lambda: bool(told.complete))
        held.unlink()
        told.until(lambda: len(told.complete) == 2)
    assert set(told.complete) == {"data:1", "data:3"}


def test_what_is_cancelled_makes_room_for_what_waits(opened: Open) -> None:  # noqa: F811
    """The engine has two groups, and would have them for ever."""
    fleet = opened(engines=1, dispatch="continuous", max_num_seqs=N)
    fleet.breaks(0, "slow", after=-1, seconds=600.0, times=2)
    with flowing(fleet) as told:
        submit(told.flow, 0, 1, 2)
        told.until(lambda: {Sent("data:0", 0), Sent("data:1", 0)} <= set(told.events))
        wait_for(lambda: len(fleet.asked(0)) == 2)
        told.flow.cancel(["data:0", "data:1"])
        told.until(lambda: bool(told.complete))
    assert set(told.complete) == {"data:2"}


def test_a_batch_is_answered_beside_it(opened: Open) -> None:  # noqa: F811
    fleet = opened(dispatch="continuous")
    with flowing(fleet) as told:
        submit(told.flow, *range(8))
        assert tokens(fleet.sample(PROMPTS, n=N, seed=7)) == expected(N, 7, 0)
        told.until(lambda: len(told.complete) == 8)
        assert 0 <= fleet.idle() <= 1


def test_without_engines_it_fails(opened: Open) -> None:  # noqa: F811
    fleet = opened(engines=1, dispatch="continuous", max_restarts=0)
    fleet.breaks(0, "die")
    with flowing(fleet) as told:
        submit(told.flow, 0)
        told.until(lambda: any(isinstance(event, Failed) for event in told.events))
    [error] = [event.error for event in told.events if isinstance(event, Failed)]
    assert isinstance(error, EngineError)


def test_without_weights_it_says_so_and_goes_on_with_the_next(opened: Open, tmp_path: Path) -> None:  # noqa: F811
    """The only engine dies twice, and nobody has kept its weights: each time it is told once, and nothing is lost."""
    fleet = opened(engines=1, dispatch="continuous")
    fleet.pass_weights(lambda members: send(members, tmp_path, 3), 3)
    with flowing(fleet) as told:
        for round_ in range(2):
            assert told.flow.hopeless() is None
            fleet.breaks(0, "die", after=1)
            submit(told.flow, 2 * round_, 2 * round_ + 1, at_least=3)
            told.until(lambda round_=round_: told.events.count(Weightless()) == round_ + 1)  # type: ignore[misc]
            assert isinstance(told.flow.hopeless(), WeightsNeededError)
            fleet.pass_weights(lambda members: send(members, tmp_path, 3), 3)
            told.until(lambda round_=round_: len(told.complete) == 2 * round_ + 2)  # type: ignore[misc]
    for number in range(4):
        assert [one.tokens for one in told.complete[f"data:{number}"]] == [
            response(seed, 3, 50)["tokens"] for seed in seeds(number)
        ]
    assert told.events.count(Weightless()) == 2
    assert not [event for event in told.events if isinstance(event, Failed)]


def test_without_weights_and_then_given_up_it_fails(opened: Open, tmp_path: Path) -> None:  # noqa: F811
    fleet = opened(engines=1, dispatch="continuous", max_restarts=1)
    fleet.pass_weights(lambda members: send(members, tmp_path, 3), 3)

    def lose(members: list[Member]) -> None:
        raise TransferError("broken off", {"engine-0": EngineLostError("gone")})

    with flowing(fleet) as told:
        fleet.breaks(0, "die")
        submit(told.flow, 0)
        told.until(lambda: Weightless() in told.events)
        with pytest.raises(TransferError):
            fleet.pass_weights(lose, 3)
        told.until(lambda: isinstance(told.events[-1], Failed))
    assert not isinstance(told.flow.hopeless(), WeightsNeededError)


def test_a_prompt_without_room_is_refused(opened: Open) -> None:  # noqa: F811
    with (
        flowing(opened(engines=1, dispatch="continuous")) as told,
        pytest.raises(DataError, match="has 128 tokens"),
    ):
        told.flow.submit("data:0", [5] * 128, [1], 0)


@pytest.mark.parametrize("change", ["in_flight", "partial_rollouts"])
def test_a_response_is_of_the_old_weights_up_to_a_token_and_of_the_new_from_there(
    change: WeightsChange,
    fleets: tuple[Fleet, Fleet],
    models: tuple[Path, Path],
    reference: Callable[[Path, list[int], list[int], float], torch.Tensor],
    tmp_path: Path,
) -> None:
    """Real engines: weights come while responses run, which go on with them in the engine, or are sent there again."""
    fleet = fleets[0]
    sync = SharedMemorySync(fleet, tmp_path)
    weights = [load_file(model / "model.safetensors") for model in models]
    sync.push(NamedTensors.of(weights[0]), version=0)
    fleet.feed("continuous")
    try:
        prompts = {f"data:{number}": prompt for number, prompt in enumerate(make_prompts(1000, seed=5))}
        with flowing(fleet, change) as told:
            for number, (key, prompt) in enumerate(prompts.items()):  # more than can be done before the push
                told.flow.submit(key, prompt, [10 * number, 10 * number + 1], 0)
            told.until(lambda: bool(told.complete))
            sync.push(NamedTensors.of(weights[1]), version=1)
            told.until(lambda: Newer(1) in told.events)
            before = set(told.complete)
            told.until(lambda: len(told.complete) >= len(before) + 40)
            told.flow.cancel(list(prompts))
    finally:
        sync.push(NamedTensors.of(weights[0]), version=2)
        fleet.feed("batch")
    changed = 0
    after = [key for key in told.complete if key not in before][:40]
    for key in after:
        prompt = prompts[key]
        for sample in told.complete[key]:
            said = torch.tensor(sample.logprobs)
            old, new = ((reference(model, prompt, sample.tokens, 1.0) - said).abs() < 1e-3 for model in models)
            switch = int(old.int().cumprod(0).sum())
            assert bool(new[switch:].all()), f"neither old nor new from token {switch} on"
            changed += 0 < switch < len(said)
            assert sample.weight_version == (0 if switch else 1)
            spans = [(0, switch)] * (switch > 0) + [(1, len(said))] * (switch < len(said))
            assert sample.weight_spans == spans
    assert changed > 0, "no response was under way when the weights came"
