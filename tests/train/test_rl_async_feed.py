"""What goes on while the learner trains, with a fleet by script: what is begun when, what a step gets, what is kept."""

import io
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from megatron_r1.config.load import validate
from megatron_r1.config.runs import RLConfig
from megatron_r1.errors import EngineError
from megatron_r1.rollout.admission import Admission, Late
from megatron_r1.rollout.flow import Failed, Weightless
from megatron_r1.rollout.responses import Response
from megatron_r1.rollout.server import WeightsNeededError
from megatron_r1.train.ahead import Deal
from megatron_r1.train.feed import Feed, Service, Taken
from megatron_r1.train.rollouts import Rollouts, Sources
from megatron_r1.types import Group, Sample
from tests.train.scripted_flow import Script
from tests.train.test_rl_rollouts import OTHER
from tests.train.test_rl_rollouts import config as run_file

AHEAD = {"max_model_len": 64, "max_tokens": 32, "dispatch": "continuous", "max_staleness": 1}
BATCH = 2


def config(**changes: Any) -> RLConfig:
    return run_file(**{"rollout": AHEAD, **changes})


def answer(key: str, version: int) -> list[Sample]:
    """Three samples that name the group and the weights; of every fourth question the rewards are equal."""
    number = int(key.partition(":")[2])
    return [
        Sample([number + 3, version + 3, 2], [-0.1, -0.2, -0.3], f"{key} by {version}", True, version,
               reward=0.0 if number % 4 == 3 else float(i), rewards={"a": float(i)}, correct=i > 0,
               step_rewards=[(1, 0.5)], weight_spans=[(version, 3)])
        for i in range(3)
    ]  # fmt: skip


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.001)


class Run:
    """A feed with its script; a step trains on positions of one source."""

    def __init__(self, stack: ExitStack, begun: dict[str, Any] | None = None, **options: Any) -> None:
        late: Late = options.pop("late", "wait")
        replaceable = options.pop("replaceable", 0)
        self.admission = Admission(BATCH, options.pop("staleness", 1), late, **options)
        self.deal = Deal(Sources(config(questions=BATCH), frozenset()), BATCH)
        if begun:
            self.deal.restore(begun["order"])
        self.script = Script(answer)
        self.script.version = begun["ledger"]["step"] if begun else 0
        self.scored: list[str] = []
        service = Service(self.script, lambda question: [1, 2], lambda key: [1, 2, 3], self.score)
        self.feed = stack.enter_context(Feed(self.admission, self.deal, service, replaceable, begun))

    def score(self, groups: Sequence[Group]) -> None:
        self.scored += [group.samples[0].text for group in groups]

    def take(self) -> Taken:
        taken = self.feed.take()
        assert taken
        return taken

    def step(self) -> list[str]:
        self.feed.wait()
        return self.take().keys


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def data(*positions: int) -> list[str]:
    return [f"data:{position}" for position in positions]


def test_groups_are_complete_while_the_learner_trains(stack: ExitStack) -> None:
    run = Run(stack)
    assert list(run.script.asked.items()) == [(key, 0) for key in data(0, 1, 2, 3)]
    run.script.complete(*data(3, 0))
    assert run.step() == data(0, 3)
    run.script.complete(*data(2, 1))  # the learner trains step 0
    until(lambda: len(run.scored) == 4)
    assert not run.script.asked, "more may not be begun by these weights"
    run.script.push(1)
    until(lambda: list(run.script.asked.items()) == [(key, 1) for key in data(4, 5)])
    assert run.step() == data(1, 2)


def test_the_step_gets_the_samples_of_its_groups(stack: ExitStack) -> None:
    run = Run(stack)
    run.script.complete(*data(1, 0))
    run.feed.wait()
    taken = run.take()
    assert [group.question.id for group in taken.groups] == ["chain_sum-0", "chain_sum-1"]
    assert [sample.text for sample in taken.groups[1].samples] == ["data:1 by 0"] * 3
    assert taken.groups[0].prompt_tokens == [1, 2]
    assert sorted(run.scored) == ["data:0 by 0", "data:1 by 0"]


def test_groups_without_advantage_are_replaced_at_once_and_so_many_for_a_step(stack: ExitStack) -> None:
    """Of questions 3, 7, 11 ... all samples get the same reward; one may be replaced for each step."""
    run = Run(stack, replaceable=1)
    run.script.complete(*data(3))
    until(lambda: list(run.script.asked) == data(0, 1, 2, 4))
    run.script.complete(*data(0, 1))
    run.feed.wait()
    taken = run.take()
    assert (taken.keys, [group.question.id for group in taken.replaced]) == (data(0, 1), ["chain_sum-3"])
    run.script.push(1)
    until(lambda: list(run.script.asked) == data(2, 4, 5, 6))
    run.script.complete(*data(2, 4))
    assert run.step() == data(2, 4)
    run.script.push(2)
    until(lambda: list(run.script.asked) == data(5, 6, 7, 8))
    run.script.complete(*data(7))
    until(lambda: list(run.script.asked) == data(5, 6, 8, 9))


def test_what_is_too_old_is_dropped_aborted_and_replaced(stack: ExitStack) -> None:
    run = Run(stack, late="drop")
    run.script.complete(*data(0, 2))
    assert run.step() == data(0, 2)
    run.script.push(1)
    until(lambda: len(run.script.asked) == 4)
    run.script.complete(*data(4, 5))
    run.feed.wait()
    taken = run.take()
    assert (taken.keys, taken.dropped) == (data(4, 5), 2)
    assert run.script.cancelled == data(1, 3)
    assert list(run.script.asked) == data(6, 7)


def test_over_sampling_takes_the_first_even_without_staleness(stack: ExitStack) -> None:
    run = Run(stack, staleness=0, late="drop", extra=1)
    assert list(run.script.asked) == data(0, 1, 2)
    run.script.complete(*data(2, 0))
    assert run.step() == data(0, 2)
    assert run.script.cancelled == data(1)
    assert not run.script.asked, "the fleet waits while the learner trains"
    run.script.push(1)
    until(lambda: list(run.script.asked) == data(3, 4, 5))


def test_an_answer_to_what_was_dropped_is_not_counted(stack: ExitStack) -> None:
    run = Run(stack, late="drop")
    run.script.complete(*data(0, 2))
    run.step()
    run.script.push(1)
    until(lambda: len(run.script.asked) == 4)
    late = dict(run.script.asked)
    run.script.complete(*data(4, 5))
    run.step()
    run.script.asked |= {key: late[key] for key in data(1)}
    run.script.complete(*data(1))
    run.script.push(2)
    until(lambda: list(run.script.asked) == data(6, 7, 8, 9))
    run.script.complete(*data(6, 7))
    assert run.step() == data(6, 7)


def test_no_group_is_begun_that_no_step_trains_on(stack: ExitStack) -> None:
    run = Run(stack, steps=2, staleness=4)
    assert list(run.script.asked) == data(0, 1, 2, 3)


def test_a_fleet_without_engines_ends_the_wait(stack: ExitStack) -> None:
    run = Run(stack)
    run.script.say(Failed(EngineError("all engines are gone")))
    with pytest.raises(EngineError, match="all engines are gone"):
        run.feed.wait()


def test_a_fleet_that_needs_weights_goes_on_with_them(stack: ExitStack) -> None:
    """Who waits is told, as often as it is so; who waits after the push was made is not."""
    run = Run(stack)
    run.script.complete(*data(0))
    for _ in range(2):
        run.script.lost = WeightsNeededError("no engine is left that has weights")
        run.script.say(Weightless())
        with pytest.raises(WeightsNeededError, match="no engine is left"):
            run.feed.wait()
        run.script.push(0)
    run.script.say(Weightless())  # read later than the push was made
    run.script.complete(*data(1))
    assert run.step() == data(0, 1)
    assert list(run.script.asked.items()) == [(key, 0) for key in data(2, 3)]


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """As checkpoints are read: plain values and tensors."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    read: dict[str, Any] = torch.load(file, weights_only=True)
    return read


def test_complete_groups_are_kept_with_all_that_they_have(stack: ExitStack) -> None:
    run = Run(stack)
    run.script.complete(*data(2, 0, 1))
    until(lambda: sum(one.finished for one in run.admission.live) == 3)
    run.take()
    resumed = Run(stack, through_a_file(run.feed.state()))
    assert list(resumed.script.asked.items()) == [(key, 1) for key in data(3, 4, 5)], "weights of step 1 are there"
    assert not resumed.scored
    resumed.script.complete(*data(3))
    resumed.feed.wait()
    [kept, again] = resumed.take().groups
    [expected] = [sample for sample in answer("data:1", 0) if sample.correct is False]
    assert kept.question.id == "chain_sum-1"
    assert kept.samples[0].logprobs == pytest.approx(expected.logprobs)
    expected.logprobs = kept.samples[0].logprobs
    assert kept.samples[0] == expected
    assert again.samples[0].text == "data:3 by 1"


def beginning(key: str, sample: int) -> Response:
    """What a fleet has of a group that is not complete."""
    number = int(key.partition(":")[2])
    return Response(
        prompt=0,
        sample=sample,
        tokens=[number, 7],
        logprobs=[-0.25, -1.5],
        finish_reason="abort",
        weight_versions=[0],
        version_ends=[2],
    )


def test_beginnings_are_kept_and_asked_to_go_on(stack: ExitStack) -> None:
    """Of group 1 there is one; of group 0, which is trained on, there was one."""
    run = Run(stack)
    run.script.beginnings = {key: [beginning(key, 2)] for key in data(0, 1)}
    run.script.complete(*data(2, 0))
    assert run.step() == data(0, 2)
    state = run.feed.state()
    assert list(state["begun"]) == data(1)
    resumed = Run(stack, through_a_file(state))
    assert list(resumed.script.asked.items()) == [(key, 1) for key in data(1, 3, 4, 5)]
    assert resumed.script.beginnings == {"data:1": [beginning("data:1", 2)]}
    ages = {one.key: one.version for one in resumed.admission.live}
    assert ages == dict(zip(data(1, 3, 4, 5), (0, 1, 1, 1), strict=True)), "it is as old as its beginning"
    again = Run(stack, through_a_file(resumed.feed.state()))
    assert again.script.beginnings == resumed.script.beginnings, "saved once more before anything has come of it"


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("late", ["wait", "drop"])
def test_killed_again_and_again_every_question_is_trained_on_once_or_dropped(
    stack: ExitStack, seed: int, late: Late
) -> None:
    chance, steps = random.Random(seed), 12
    options = {"late": late, "replaceable": 1, "staleness": chance.choice([1, 2]), "steps": steps}
    saved: dict[str, Any] | None = None
    trained: dict[int, list[str]] = {}
    left: dict[int, list[str]] = {}
    """Questions replaced or dropped by the time of a step."""
    done = 0
    while done < steps:
        run, life = Run(stack, saved, **options), done + chance.randint(1, 4)
        while done < min(life, steps):
            left.setdefault(done, [])
            while not run.admission.ready:
                if ripe := [key for key, at_least in run.script.asked.items() if at_least <= run.script.version]:
                    before = len(run.scored)
                    run.script.complete(chance.choice(ripe))
                    until(lambda run=run, before=before: len(run.scored) > before)  # type: ignore[misc]
                    time.sleep(0.002)
            taken = run.take()
            trained[done] = taken.keys
            done += 1
            run.script.push(done)
            until(lambda run=run, done=done: run.admission.version == done)  # type: ignore[misc]
            if chance.random() < 0.7:
                saved, at = through_a_file(run.feed.state()), done
        done = at if saved else 0  # the kill
        for step in range(done, steps):
            trained.pop(step, None)
    names = [key for keys in trained.values() for key in keys]
    assert len(names) == steps * BATCH == len(set(names))
    dropped = run.admission.dropped
    assert run.deal.sources.drawn["data"] == len(names) + dropped + len(run.admission.live)
    if late == "wait":
        assert not run.admission.live
        asked = {f"data:{position}" for position in range(run.deal.sources.drawn["data"])}
        assert all(int(key.partition(":")[2]) % 4 == 3 for key in asked - set(names)), "only groups without advantage"


def test_questions_of_both_sources_in_their_share_replacements_included() -> None:
    section = config(general={"task": OTHER, "share": 0.25, "from_step": 1, "rewards": ["accuracy"]})
    deal = Deal(Sources(section, frozenset()), 8)
    keys = [deal.begin() for _ in range(24)]
    sources = [key.partition(":")[0] for key in keys]
    assert [sources[at : at + 8].count("general") for at in (0, 8, 16)] == [0, 2, 2]
    assert len(set(keys)) == 24
    deal.replace("general:1")
    assert deal.begin() == "general:4"
    again = Deal(Sources(section, frozenset()), 8)
    again.restore(deal.state())
    assert [again.begin() for _ in range(8)] == [deal.begin() for _ in range(8)]
    assert deal.question("general:2").id == "basic_arithmetic-2"


def test_a_synchronous_run_refuses_groups_in_flight() -> None:
    with pytest.raises(ValueError, match="which a synchronous run would skip"):
        Rollouts(run_file(), frozenset()).restore({"in_flight": {"ledger": {"live": [["data:1", 0, None]]}}})
    Rollouts(run_file(), frozenset()).restore({"in_flight": {"ledger": {"live": []}}, "questions_drawn": 4.0})


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"dispatch": "batch"}, 'max_staleness above 0 needs dispatch = "continuous"'),
        ({"max_staleness": 0, "over_sampling": 2, "dispatch": "batch"}, "over_sampling above 0 needs dispatch"),
        ({"over_sampling": 2}, 'over_sampling needs late = "drop" or "keep"'),
        ({"max_staleness": 0, "late": "keep"}, "late = 'keep' goes with max_staleness above 0"),
    ],
)
def test_what_does_not_fit_together_is_refused(rollout: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(rollout=AHEAD | rollout)


def test_stale_samples_are_corrected_unless_the_run_file_says_otherwise() -> None:
    assert run_file().correction.kind == "none"
    assert (config().correction.kind, config().correction.cap) == ("token", 2.0)
    assert config(correction={"cap": 5.0}).correction.kind == "token"
    assert config(correction={"kind": "none"}).correction.kind == "none"
    resolved = config().model_dump(mode="json", exclude_none=True)
    assert validate(RLConfig, resolved, where="again") == config()
