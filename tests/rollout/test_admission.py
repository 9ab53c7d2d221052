"""The rule of asynchrony in any order of completions, over kills and resumes, against what a synchronous loop does."""

import json
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.rollout.admission import Admission, Late, Step


@dataclass
class Run:
    """A loop whose groups are the positions 0, 1, ... and whose fleet finishes them in a random order."""

    admission: Admission
    chance: random.Random
    position: int = 0
    running: dict[int, int] = field(default_factory=dict)
    """Groups that engines have, and the version that has begun each."""
    queued: dict[int, int] = field(default_factory=dict)
    """Groups that wait for an engine, and the version that each needs."""
    finished: set[int] = field(default_factory=set)
    steps: list[Step] = field(default_factory=list)
    ages: list[list[int]] = field(default_factory=list)
    """Staleness of each step's groups."""
    versions: dict[int, int] = field(default_factory=dict)
    discarded: set[int] = field(default_factory=set)

    def fill(self) -> None:
        while self.admission.room:
            self.queued[self.position] = self.admission.begin(self.position)
            self.position += 1

    def send(self) -> None:
        """Some engine, with weights of some version that will do, takes what has waited longest."""
        key = next(iter(self.queued))
        at_least = self.queued.pop(key)
        assert at_least <= self.admission.version, "no engine has such weights: the loop would wait for ever"
        version = self.chance.randint(at_least, self.admission.version)
        self.admission.sent(key, version)
        self.running[key] = self.versions[key] = version

    def finish(self) -> None:
        key = self.chance.choice(sorted(self.running))
        del self.running[key]
        self.admission.finished(key)
        self.finished.add(key)

    def learn(self) -> bool:
        """Train a step, if one may be; the new weights reach the engines at once or with the next."""
        step = self.admission.take()
        if step is None:
            return False
        self.ages.append([step.number - self.versions[int(key)] for key in step.groups])
        self.steps.append(step)
        for key in map(int, step.dropped):
            self.running.pop(key, None)
            self.queued.pop(key, None)
        self.admission.published(self.admission.step)
        return True

    def advance(self, steps: int) -> None:
        """Until so many steps are trained."""
        while len(self.steps) < steps:
            self.fill()
            acts = [self.send] * bool(self.queued) + [self.finish] * bool(self.running)
            ready = self.chance.random() < 0.5 and self.learn()
            if not ready and acts:
                self.chance.choice(acts)()
            assert ready or acts or self.admission.room or self.learn(), "nothing can go on"

    def resumed(self, saved: set[int]) -> "Run":
        """The run after a kill: the ledger is all that is left, and the samples of `saved`."""
        state = json.loads(json.dumps(self.admission.state()))
        old = self.admission
        admission = Admission(old.batch, old.max_staleness, old.late, old.extra)
        again = admission.restore(state, saved)
        run = Run(admission, self.chance, self.position, queued={int(key): admission.version for key in again})
        run.steps, run.ages, run.versions, run.finished = self.steps, self.ages, self.versions, saved & self.finished
        return run


cases = given(
    batch=st.integers(1, 5),
    staleness=st.integers(0, 4),
    seed=st.integers(0, 10**6),
    late=st.sampled_from(["wait", "drop"]),
)


def trained(run: Run) -> list[int]:
    return [int(key) for step in run.steps for key in step.groups]


@cases
@settings(deadline=None)
def test_every_order_of_completions(batch: int, staleness: int, seed: int, late: Late) -> None:
    extra = seed % 4 if late == "drop" else 0
    run = Run(Admission(batch, staleness, late, extra), random.Random(seed))
    run.advance(8)
    assert [step.number for step in run.steps] == list(range(8))
    assert all(len(step.groups) == batch for step in run.steps)
    assert all(0 <= age <= staleness for ages in run.ages for age in ages)
    dropped = [int(key) for step in run.steps for key in step.dropped]
    alive = [int(one.key) for one in run.admission.live]
    assert sorted(trained(run) + dropped + alive) == list(range(run.position)), "a group was lost, or is there twice"
    assert run.admission.dropped == len(dropped)
    assert sum(run.admission.staleness.values()) == 8 * batch
    assert run.admission.staleness.keys() == {age for ages in run.ages for age in ages}
    if late == "wait" or staleness == extra == 0:
        assert not dropped
        assert max(trained(run)) < (8 + staleness) * batch


@given(batch=st.integers(1, 6), seed=st.integers(0, 10**6))
@settings(deadline=None)
def test_without_staleness_it_is_the_synchronous_loop(batch: int, seed: int) -> None:
    run = Run(Admission(batch, 0), random.Random(seed))
    run.advance(5)
    assert trained(run) == list(range(5 * batch))
    assert [step.groups for step in run.steps] == [list(range(s * batch, (s + 1) * batch)) for s in range(5)]
    assert run.admission.staleness == {0: 5 * batch}


@cases
@settings(deadline=None)
def test_killed_and_resumed_nothing_is_skipped_or_sampled_twice(
    batch: int, staleness: int, seed: int, late: Late
) -> None:
    chance = random.Random(seed)
    run = Run(Admission(batch, staleness, late), chance)
    done: list[int] = []
    for steps in range(1, 7):
        run.advance(steps)
        for _ in range(chance.randrange(4)):
            if run.running:
                run.finish()
        ledger = {int(one.key): one.finished for one in run.admission.live}
        saved = {key for key in ledger if ledger[key] and chance.random() < 0.7}
        run = run.resumed(saved)
        assert list(run.queued) == [key for key in ledger if key not in saved]
        done += [int(key) for step in run.steps[len(done) :] for key in step.groups]
    dropped = [int(key) for step in run.steps for key in step.dropped]
    assert sorted(trained(run) + dropped + [int(one.key) for one in run.admission.live]) == list(range(run.position))
    assert all(0 <= age <= staleness for ages in run.ages for age in ages)
    assert run.admission.dropped == len(dropped)


def test_what_is_ahead() -> None:
    admission = Admission(batch=2, max_staleness=1)
    assert admission.room == 4
    assert [admission.begin(key) for key in "abcd"] == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="no room"):
        admission.begin("e")
    for key in "abcd":
        admission.sent(key, 0)
    for key in "da":
        assert admission.take() is None
        admission.finished(key)
    # Step 0: the first that are complete, in their order. c, begun by version 0, may be a step late.
    assert admission.take() == Step(0, ["a", "d"])
    assert admission.room == 0
    admission.published(1)
    admission.finished("b")
    assert [admission.begin(key) for key in "ef"] == [1, 1]
    for key in "ef":
        admission.sent(key, 1)
        admission.finished(key)
    # Step 1 has e and f, but c would be too old for step 2.
    assert admission.take() is None
    admission.finished("c")
    assert admission.take() == Step(1, ["b", "c"])
    assert admission.staleness == {0: 2, 1: 2}


def test_what_would_be_due_together_is_waited_for_in_time() -> None:
    """Four groups of version 0 cannot all be trained at step 2, so step 1 takes one of them or waits."""
    admission = Admission(batch=2, max_staleness=2)
    for key in "abcdef":
        admission.begin(key)
        admission.sent(key, 0)
    for key in "ab":
        admission.finished(key)
    assert admission.take() == Step(0, ["a", "b"])
    admission.published(1)
    for key in "gh":
        admission.begin(key)
        admission.sent(key, 1)
        admission.finished(key)
    assert admission.take() is None
    admission.finished("e")
    assert admission.take() is None
    admission.finished("f")
    assert admission.take() == Step(1, ["e", "f"])


def late_group(late: Late) -> Admission:
    """Two groups a step, staleness 1; group b of version 0 is not there when c and d of version 1 are."""
    admission = Admission(2, 1, late)
    for key in "abcd":
        admission.begin(key)
        admission.sent(key, 0)
    for key in "acd":
        admission.finished(key)
    assert admission.take() == Step(0, ["a", "c"])
    admission.published(1)
    for key in "ef":
        admission.begin(key)
        admission.sent(key, 1)
        admission.finished(key)
    return admission


def test_a_late_group_is_waited_for() -> None:
    assert late_group("wait").take() is None


def test_a_late_group_is_dropped_and_replaced() -> None:
    admission = late_group("drop")
    assert admission.take() == Step(1, ["d", "e"], ["b"])
    assert (admission.dropped, admission.room) == (1, 1)
    assert admission.begin("g") == 1
    admission.published(2)
    assert admission.room == 2


def test_a_late_group_is_kept() -> None:
    admission = late_group("keep")
    assert admission.take() == Step(1, ["d", "e"])
    admission.finished("b")
    assert admission.take() == Step(2, ["b", "f"])
    assert admission.staleness == {0: 2 + 1, 1: 1 + 1, 2: 1}


def test_more_are_begun_and_the_first_are_taken() -> None:
    admission = Admission(2, 0, "drop", extra=2)
    assert [admission.begin(key) for key in "abcd"] == [0, 0, 0, 0]
    for key in "abcd":
        admission.sent(key, 0)
    for key in "dbc":
        admission.finished(key)
    assert admission.take() == Step(0, ["b", "d"], ["a", "c"])
    assert admission.room == 0, "by these weights they would be too old"
    admission.published(1)
    assert [admission.begin(key) for key in "efgh"] == [1, 1, 1, 1]


@given(
    batch=st.integers(1, 5),
    staleness=st.integers(0, 4),
    seed=st.integers(0, 10**6),
    extra=st.integers(0, 6),
    steps=st.integers(1, 6),
)
@settings(deadline=None)
def test_what_is_kept_is_trained_on_once_over_sampled_or_not(
    batch: int, staleness: int, seed: int, extra: int, steps: int
) -> None:
    run = Run(Admission(batch, staleness, "keep", extra, steps), random.Random(seed))
    run.fill()
    assert run.position == min((staleness + 1) * batch + extra, steps * batch)
    run.advance(steps)
    assert sorted(trained(run)) == list(range(steps * batch)), "nothing is thrown away, and nothing is left at the end"
    assert (run.admission.dropped, len(run.admission.live), run.admission.room) == (0, 0, 0)


def test_a_group_stays_as_old_as_what_was_saved_of_it() -> None:
    """Of "b" a beginning by weights 0 was saved, of "c" nothing."""
    admission = Admission(1, 2)
    for key in "abc":
        admission.begin(key)
        admission.sent(key, 0)
    admission.finished("a")
    admission.take()
    resumed = Admission(1, 2)
    assert resumed.restore(json.loads(json.dumps(admission.state())), saved=[], begun=["b"]) == ["b", "c"]
    resumed.sent("b", 1)
    resumed.sent("c", 1)
    resumed.finished("c")
    assert resumed.take() == Step(1, ["c"]), "there is one more step for what is due at step 2"
    resumed.published(2)
    resumed.begin("d")
    resumed.sent("d", 2)
    resumed.finished("d")
    assert resumed.take() is None, "it is waited for"
    resumed.finished("b")
    assert resumed.take() == Step(2, ["b"])
    assert resumed.staleness == {0: 2, 2: 1}


def test_discarded_groups_are_replaced() -> None:
    """Dynamic sampling: a group whose rewards are all equal makes room for another."""
    admission = Admission(1, 0)
    admission.begin("a")
    admission.sent("a", 0)
    assert admission.room == 0
    admission.finished("a")
    admission.discard("a")
    assert admission.take() is None
    assert (admission.room, admission.dropped) == (1, 1)


def test_the_oldest_part_of_a_group_counts() -> None:
    admission = Admission(1, 2)
    admission.begin("a")
    admission.sent("a", 0)
    admission.published(0)
    admission.sent("a", 0)
    admission.finished("a")
    admission.take()
    admission.published(1)
    admission.begin("b")
    admission.sent("b", 0)  # this engine died with half of its samples
    admission.sent("b", 1)
    admission.finished("b")
    admission.take()
    assert admission.staleness == {0: 1, 1: 1}
    admission.published(2)
    admission.begin("c")
    admission.sent("c", 2)  # this one, too; of those that are left one has older weights
    admission.sent("c", 1)
    admission.finished("c")
    admission.take()
    assert admission.staleness == {0: 1, 1: 2}


def test_no_group_is_begun_beyond_the_last_step() -> None:
    admission = Admission(2, 3, "drop", extra=1, steps=2)
    assert admission.room == 2 * 2 + 1


def test_what_cannot_be() -> None:
    admission = Admission(1, 0)
    admission.begin(0)
    with pytest.raises(ValueError, match="was not sent"):
        admission.finished(0)
    admission.sent(0, 0)
    admission.finished(0)
    admission.take()
    with pytest.raises(ValueError, match="version 2"):
        admission.published(2)
    admission.published(1)
    assert admission.begin(1) == 1
    with pytest.raises(ValueError, match="for weights 1"):
        admission.sent(1, 0)
    for options in ((0, 0, "wait", 0), (1, -1, "wait", 0), (1, 0, "wait", 1)):
        with pytest.raises(ValueError, match="batch"):
            Admission(*options)  # type: ignore[arg-type]
