"""The scheduler against its promises: by hand, and in random histories of a fleet whose truth the test keeps itself."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from megatron_r1.rollout.scheduler import Assignment, Scheduler


def sent(scheduler: Scheduler) -> list[tuple[str, Any, tuple[int, ...]]]:
    return [(one.engine, one.key, one.samples) for one in scheduler.assign()]


def finish(scheduler: Scheduler, assignment: Assignment, tokens: int = 10) -> list[str]:
    return [scheduler.finished(assignment.engine, assignment.key, sample, tokens) for sample in assignment.samples]


def two_engines(capacity: int = 4, **options: int) -> Scheduler:
    scheduler = Scheduler(**options)
    scheduler.joined("a", capacity)
    scheduler.joined("b", capacity)
    return scheduler


def test_groups_are_balanced_by_tokens() -> None:
    scheduler = two_engines(capacity=100)
    scheduler.submit("long", 500, 2, max_tokens=100)
    for key in range(5):
        scheduler.submit(key, 5, 2, max_tokens=100)
    assert [(engine, key) for engine, key, _ in sent(scheduler)] == [
        ("a", "long"),
        *(("b", key) for key in range(4)),
        ("a", 4),
    ]
    assert [load.tokens for load in scheduler.engines.values()] == [700 + 205, 4 * 205]


def test_an_engine_of_twice_the_size_gets_twice_the_work() -> None:
    scheduler = Scheduler()
    scheduler.joined("small", 10)
    scheduler.joined("large", 20)
    for key in range(9):
        scheduler.submit(key, 0, 1, max_tokens=50)
    engines = [engine for engine, _, _ in sent(scheduler)]
    assert (engines.count("small"), engines.count("large")) == (3, 6)


def test_work_waits_here_and_not_in_an_engine() -> None:
    scheduler = two_engines(capacity=4, group_size=4)
    for key in range(3):
        scheduler.submit(key, 1, 4, max_tokens=10)
    first, second = scheduler.assign()
    assert scheduler.waiting == 4
    assert sent(scheduler) == []
    # One sequence of b is free: the whole group goes there, for its prompt is computed once.
    assert scheduler.finished("b", second.key, 2, 7) == "counted"
    assert sent(scheduler) == [("b", 2, (0, 1, 2, 3))]
    assert scheduler.engines["b"].sequences == 7
    assert finish(scheduler, first) == ["counted"] * 3 + ["complete"]
    assert sent(scheduler) == []


def test_an_engine_with_room_for_a_whole_group_comes_first() -> None:
    scheduler = two_engines(capacity=4, group_size=4)
    scheduler.submit("dear", 1000, 1, max_tokens=10)
    for key in (0, 1):
        scheduler.submit(key, 1, 4, max_tokens=10)
    # Engine a has the most tokens, but no other has so few sequences too many.
    assert [(engine, key) for engine, key, _ in sent(scheduler)] == [("a", "dear"), ("b", 0), ("a", 1)]


def test_reserve() -> None:
    scheduler = Scheduler(reserve=2)
    scheduler.joined("a", 4)
    for key in range(9):
        scheduler.submit(key, 1, 1, max_tokens=10)
    assert len(scheduler.assign()) == 6
    scheduler.finished("a", 0, 0, 5)
    assert [key for _, key, _ in sent(scheduler)] == [6]


def test_a_group_larger_than_an_engine() -> None:
    scheduler = two_engines(capacity=2)
    scheduler.submit("huge", 1, 9, max_tokens=10)
    scheduler.submit("next", 1, 9, max_tokens=10)
    assert [(engine, len(samples)) for engine, _, samples in sent(scheduler)] == [("a", 9), ("b", 9)]


def test_what_an_engine_leaves_goes_first_and_without_what_is_there() -> None:
    scheduler = two_engines(capacity=4)
    for key in range(4):
        scheduler.submit(key, 1, 4, max_tokens=10)
    first, second = scheduler.assign()
    scheduler.finished("a", first.key, 1, 8)
    assert scheduler.left("a") == [0]
    assert finish(scheduler, first) == ["ignored"] * 4
    assert finish(scheduler, second)[-1] == "complete"
    assert sent(scheduler) == [("b", 0, (0, 2, 3)), ("b", 2, (0, 1, 2, 3))]
    assert finish(scheduler, first) == ["ignored"] * 4  # too late from an engine that is gone
    assert scheduler.finished("b", 0, 1, 8) == "ignored"
    assert [scheduler.finished("b", 0, sample, 8) for sample in (0, 2, 3)] == ["counted", "counted", "complete"]
    assert list(scheduler.groups) == [2, 3]


def test_expected_tokens_follow_what_is_seen() -> None:
    scheduler = Scheduler()
    scheduler.joined("a", 100)
    scheduler.submit(0, 7, 2, max_tokens=1000)
    (first,) = scheduler.assign()
    assert scheduler.engines["a"].tokens == 7 + 2000  # nothing is known: the longest
    scheduler.finished("a", 0, 0, 100)
    assert scheduler.engines["a"].tokens == 7 + 1000
    scheduler.finished("a", 0, 1, 300)
    assert scheduler.engines["a"].tokens == 0
    scheduler.submit(1, 7, 2, max_tokens=1000)
    scheduler.submit(2, 7, 2, max_tokens=50)
    scheduler.assign()
    assert scheduler.engines["a"].tokens == 7 + 400 + 7 + 100
    assert first.samples == (0, 1)


def test_a_held_engine_gets_nothing() -> None:
    scheduler = two_engines(capacity=2)
    scheduler.hold("a")
    for key in range(3):
        scheduler.submit(key, 1, 2, max_tokens=10)
    assert [engine for engine, _, _ in sent(scheduler)] == ["b"]
    scheduler.release("a", 1)
    assert sent(scheduler) == [("a", 1, (0, 1))]


def test_old_weights_do_not_get_what_asks_for_new_ones() -> None:
    scheduler = two_engines(capacity=2)
    scheduler.submit("new", 1, 2, max_tokens=10, at_least=1)
    scheduler.submit("any", 1, 2, max_tokens=10)
    assert sent(scheduler) == [("a", "any", (0, 1))]
    scheduler.hold("a")
    scheduler.release("b", 1)
    assert sent(scheduler) == [("b", "new", (0, 1))]


def test_cancelled_groups() -> None:
    scheduler = two_engines(capacity=1)
    for key in range(3):
        scheduler.submit(key, 1, 2, max_tokens=10)
    scheduler.assign()
    assert [scheduler.cancel(key) for key in (0, 2, "unknown")] == ["a", None, None]
    assert scheduler.finished("a", 0, 0, 5) == "ignored"
    assert (scheduler.engines["a"].tokens, scheduler.waiting) == (0, 0)
    assert sent(scheduler) == []


def test_what_cannot_be() -> None:
    scheduler = two_engines()
    scheduler.submit(0, 1, 1, max_tokens=1)
    with pytest.raises(ValueError, match="already queued"):
        scheduler.submit(0, 1, 1, max_tokens=1)
    with pytest.raises(ValueError, match="empty"):
        scheduler.submit(1, 1, 0, max_tokens=1)
    with pytest.raises(ValueError, match="already known"):
        scheduler.joined("a", 1)
    with pytest.raises(ValueError, match="without a sequence"):
        scheduler.joined("c", 0)


class FleetHistory(RuleBasedStateMachine):
    """Engines come, go and are updated, groups are answered: what was submitted is kept here in plain sets."""

    def __init__(self) -> None:
        super().__init__()
        self.reserve, self.group_size, self.max_samples = 2, 4, 6
        self.scheduler = Scheduler(self.group_size, self.reserve)
        self.capacity: dict[str, int] = {}
        self.version: dict[str, int] = {}
        self.held: set[str] = set()
        self.missing: dict[int, set[int]] = {}
        self.at_least: dict[int, int] = {}
        self.running: dict[int, str] = {}
        self.stale: list[tuple[str, int, int]] = []  # answers that may still come from engines that are gone
        self.newest = self.names = self.keys = 0

    def in_flight(self, engine: str) -> int:
        return sum(len(self.missing[key]) for key, at in self.running.items() if at == engine)

    @rule(capacity=st.integers(1, 8))
    def join(self, capacity: int) -> None:
        name = f"engine-{self.names}"
        self.names += 1
        self.capacity[name], self.version[name] = capacity, self.newest
        self.scheduler.joined(name, capacity, self.newest)

    @rule(samples=st.integers(1, 6), prompt=st.integers(0, 50), maximum=st.integers(1, 90), data=st.data())
    def submit(self, samples: int, prompt: int, maximum: int, data: st.DataObject) -> None:
        at_least = data.draw(st.integers(max(0, self.newest - 1), self.newest))
        self.missing[self.keys], self.at_least[self.keys] = set(range(samples)), at_least
        self.scheduler.submit(self.keys, prompt, samples, maximum, at_least)
        self.keys += 1

    @rule()
    def assign(self) -> None:
        for one in self.scheduler.assign():
            assert isinstance(one.key, int)
            assert one.key not in self.running, "given to two engines"
            assert set(one.samples) == self.missing[one.key]
            assert one.engine in self.capacity
            assert one.engine not in self.held
            assert self.version[one.engine] >= self.at_least[one.key]
            self.running[one.key] = one.engine
            over = self.in_flight(one.engine) - self.capacity[one.engine]
            assert over <= max(self.reserve, len(one.samples) - 1)
        waiting = [key for key in self.missing if key not in self.running]
        for engine in self.capacity.keys() - self.held:
            if self.in_flight(engine) < self.capacity[engine]:
                assert all(self.at_least[key] > self.version[engine] for key in waiting), "idles while work waits"

    @precondition(lambda self: self.running)
    @rule(data=st.data(), tokens=st.integers(1, 90))
    def finish(self, data: st.DataObject, tokens: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.running)))
        sample = data.draw(st.sampled_from(sorted(self.missing[key])))
        self.missing[key].remove(sample)
        self.stale.append((self.running[key], key, sample))
        outcome = self.scheduler.finished(self.running[key], key, sample, tokens)
        assert outcome == ("counted" if self.missing[key] else "complete")
        if outcome == "complete":
            self.forget(key)

    @precondition(lambda self: self.stale)
    @rule(data=st.data())
    def answer_twice(self, data: st.DataObject) -> None:
        engine, key, sample = data.draw(st.sampled_from(self.stale))
        expected = self.running.get(key) == engine and sample in self.missing.get(key, ())
        assert expected or self.scheduler.finished(engine, key, sample, 1) == "ignored"

    @precondition(lambda self: self.capacity)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        engine = data.draw(st.sampled_from(sorted(self.capacity)))
        lost = [key for key, at in self.running.items() if at == engine]
        if lost:
            self.stale = [(engine, key, sample) for key in lost for sample in self.missing[key]]
        assert sorted(self.scheduler.left(engine), key=str) == sorted(lost, key=str)
        for key in lost:
            del self.running[key]
        del self.capacity[engine], self.version[engine]
        self.held.discard(engine)

    @precondition(lambda self: self.missing)
    @rule(data=st.data())
    def lose_or_cancel(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.missing)))
        if data.draw(st.booleans()):
            self.scheduler.returned(key)
            self.running.pop(key, None)
        else:
            assert self.scheduler.cancel(key) == self.running.get(key)
            self.forget(key)

    @precondition(lambda self: self.capacity)
    @rule(data=st.data())
    def hold_or_release(self, data: st.DataObject) -> None:
        engine = data.draw(st.sampled_from(sorted(self.capacity)))
        if engine in self.held:
            self.version[engine] = data.draw(st.integers(self.version[engine], self.newest))
            self.held.remove(engine)
            self.scheduler.release(engine, self.version[engine])
        else:
            self.held.add(engine)
            self.scheduler.hold(engine)

    @rule()
    def train(self) -> None:
        self.newest += 1

    @invariant()
    def nothing_is_lost(self) -> None:
        assert {key: group.missing for key, group in self.scheduler.groups.items()} == self.missing
        assert {key: group.engine.name for key, group in self.scheduler.groups.items() if group.engine} == self.running

    @invariant()
    def loads_are_what_is_outstanding(self) -> None:
        for name, load in self.scheduler.engines.items():
            groups = load.groups.values()
            assert load.sequences == self.in_flight(name)
            assert load.tokens == sum(group.prompt_tokens + group.expected * len(group.missing) for group in groups)

    def teardown(self) -> None:
        """With an engine of the newest weights, everything comes to an end."""
        self.newest += 1
        self.join(3)
        for _ in range(sum(map(len, self.missing.values())) + 1):
            self.assign()
            for key in list(self.running):
                for sample in list(self.missing[key]):
                    self.missing[key].remove(sample)
                    self.scheduler.finished(self.running[key], key, sample, 1)
                self.forget(key)
        assert self.scheduler.groups == self.missing == {}

    def forget(self, key: int) -> None:
        self.running.pop(key, None)
        del self.missing[key]


FleetHistory.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestFleetHistory = FleetHistory.TestCase


def test_queues_stay_as_small_as_the_fleet() -> None:
    """Entries that are void are thrown away: what a long run holds in memory does not grow with its steps."""
    scheduler = Scheduler(group_size=4)
    for number in range(16):
        scheduler.joined(f"engine-{number}", 8)
    for key in range(2000):
        scheduler.submit(key, 1, 4, max_tokens=10, at_least=key // 100)
        if key % 100 == 0:
            for engine in scheduler.engines:
                scheduler.hold(engine)
                scheduler.release(engine, key // 100)
        if scheduler.waiting > 64:
            for one in scheduler.assign():
                finish(scheduler, one)
    held = [scheduler._waiting, *scheduler._open.values()]
    assert max(map(len, held)) <= 4 * 16 + 65
    assert len(scheduler._open) == len(scheduler._versions) == 1
