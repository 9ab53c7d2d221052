"""Which engine answers which group of samples: a state machine without threads, sockets or clocks.

It is told what happens to engines and groups (`joined`, `submit`, `finished`, ...), and `assign` says what to send now.
The fleet and `tools/simulate_fleet.py` run this very class. Its rules:

* A group stays together, so that its prompt is computed once, and waits here, not in an engine, until an engine has a
  sequence free for it: no engine idles behind another's queue.
* Of the engines with room, the one with the fewest outstanding tokens for its size gets the next group.
* A group may ask for weights of a version `at_least`; engines with older ones do not get it.
* What an engine leaves unfinished is the first to be sent again; samples that it had finished are not.

Each event costs O(log n) of groups and engines.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from types import MappingProxyType
from typing import Literal

Key = int | str
"""Names a group."""
Place = tuple[int, int, int]
"""Of a group in the queue, the smallest first.

The oldest version that may answer it (`at_least`); 0 if an engine has left it unfinished, so that it goes before all
that were never sent, which have 1; the number of its arrival, which it keeps when it comes back.
"""
WINDOW = 2048
"""Responses over which the expected length is averaged."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """Send these samples of a group to an engine now."""

    engine: str
    key: Key
    samples: tuple[int, ...]
    """Those that are missing, by their numbers in the group."""


@dataclass(eq=False, slots=True)
class Group:
    """What the scheduler knows of a group that is not complete."""

    key: Key
    prompt_tokens: int
    max_tokens: int
    missing: set[int]
    place: Place
    engine: "EngineLoad | None" = None
    """Where it runs; None while it waits."""
    expected: int = 0
    """Tokens of each response, as estimated when it was sent."""


@dataclass(eq=False, slots=True)
class EngineLoad:
    """One engine's share of the work."""

    name: str
    capacity: int
    """Sequences that it runs at once."""
    version: int
    """Of its weights."""
    held: bool = False
    sequences: int = 0
    """Sent and not finished."""
    tokens: int = 0
    """Outstanding: prompts of its groups, and what is expected of responses that are not finished."""
    groups: dict[Key, Group] = field(default_factory=dict)
    stamp: int = -1
    """Of its valid entry among the open engines; -1 while it gets nothing."""


class Scheduler:
    """Balances groups over engines.

    Args:
        group_size: samples that a group usually has; an engine with so many sequences free is preferred to one that
            would have to queue some of them.
        reserve: sequences that an engine is sent beyond its capacity, so that it need not wait for the next ones. An
            engine with a sequence free takes a whole group, so the excess is at most
            `max(reserve, samples of the group - 1)`.
    """

    def __init__(self, group_size: int = 1, reserve: int = 0) -> None:
        self.group_size, self.reserve = group_size, reserve
        self.expected_length: float | None = None
        """Mean tokens of the latest responses; None before the first."""
        self._engines: dict[str, EngineLoad] = {}
        self._groups: dict[Key, Group] = {}
        self._waiting: list[tuple[Place, Group]] = []
        self._open: dict[int, list[tuple[int, float, int, EngineLoad]]] = {}
        """By version, a heap of (sequences too many for one more group, load, stamp, engine); old stamps are void."""
        self._versions: Counter[int] = Counter()
        """Engines by version."""
        self._stamps = self._arrivals = self._seen = 0

    @property
    def engines(self) -> Mapping[str, EngineLoad]:
        """To be read only."""
        return MappingProxyType(self._engines)

    @property
    def groups(self) -> Mapping[Key, Group]:
        """All that are not complete; to be read only."""
        return MappingProxyType(self._groups)

    @property
    def waiting(self) -> int:
        """Sequences that no engine has yet."""
        return sum(len(group.missing) for group in self._groups.values() if group.engine is None)

    def joined(self, engine: str, capacity: int, version: int = 0) -> None:
        """An engine is ready. One that comes back needs a new name: answers of its former life may be on their way."""
        if engine in self._engines or capacity < 1:
            raise ValueError(f"engine {engine!r} with capacity {capacity}: already known, or without a sequence")
        self._engines[engine] = EngineLoad(engine, capacity, version)
        self._versions[version] += 1
        self._moved(self._engines[engine])

    def left(self, engine: str) -> list[Key]:
        """An engine is gone; returns the groups that it has left unfinished, which are the next to be sent."""
        gone = self._engines.pop(engine)
        gone.stamp = -1
        self._lose_version(gone)
        keys = list(gone.groups)
        for key in keys:
            self.returned(key)
        return keys

    def hold(self, engine: str) -> None:
        """Send nothing to an engine until its `release`; what it has goes on (it is drained at `sequences == 0`)."""
        held = self._engines[engine]
        held.held, held.stamp = True, -1

    def release(self, engine: str, version: int) -> None:
        """The engine takes work again, with weights of this version."""
        released = self._engines[engine]
        self._lose_version(released)
        released.held, released.version = False, version
        self._versions[version] += 1
        self._moved(released)

    def submit(
        self,
        key: Key,
        prompt_tokens: int,
        samples: int,
        max_tokens: int,
        at_least: int = 0,
        there: Collection[int] = (),
    ) -> None:
        """Queue a group.

        Args:
            key: its name, until it is complete.
            prompt_tokens: length of the prompt that its samples share.
            samples: how many responses.
            max_tokens: longest response.
            at_least: version of the oldest weights that may answer it.
            there: samples that need no answer.
        """
        if key in self._groups or samples < 1:
            raise ValueError(f"group {key!r} of {samples} samples: already queued, or empty")
        self._arrivals += 1
        place = (at_least, 1, self._arrivals)
        group = Group(key, prompt_tokens, max_tokens, set(range(samples)).difference(there), place)
        self._groups[key] = group
        heappush(self._waiting, (place, group))

    def assign(self) -> list[Assignment]:
        """What to send now; counts as sent."""
        sent: list[Assignment] = []
        while (group := self._first()) and (engine := self._best(group)) and self._fits(engine, group):
            heappop(self._waiting)
            sent.append(self._send(engine, group))
        return sent

    def finished(self, engine: str, key: Key, sample: int, tokens: int) -> Literal["ignored", "counted", "complete"]:
        """An engine has finished a sample.

        Returns:
            "complete" with the last sample of a group, which is then forgotten; "ignored" for what is not expected of
            this engine (any more): a group that went elsewhere or was cancelled, a sample that was there already.
        """
        group, load = self._groups.get(key), self._engines.get(engine)
        if group is None or load is None or group.engine is not load or sample not in group.missing:
            return "ignored"
        self._seen = min(self._seen + 1, WINDOW)
        mean = self.expected_length or 0.0
        self.expected_length = mean + (tokens - mean) / self._seen
        group.missing.remove(sample)
        load.sequences -= 1
        load.tokens -= group.expected
        if not group.missing:
            load.tokens -= group.prompt_tokens
            del load.groups[key], self._groups[key]
        self._moved(load)
        return "counted" if group.missing else "complete"

    def returned(self, key: Key) -> None:
        """An engine will not finish this group: what is missing of it is the next to be sent."""
        group = self._groups[key]
        if group.engine is None:
            return
        self._take_off(group)
        group.place = (group.place[0], 0, group.place[2])
        heappush(self._waiting, (group.place, group))

    def cancel(self, key: Key) -> str | None:
        """Forget a group; returns the engine that it runs on, where it should be aborted."""
        group = self._groups.pop(key, None)
        if group is None or group.engine is None:
            return None
        name = group.engine.name
        self._take_off(group)
        return name

    def _send(self, engine: EngineLoad, group: Group) -> Assignment:
        group.engine = engine
        group.expected = min(group.max_tokens, round(self.expected_length or group.max_tokens))
        engine.groups[group.key] = group
        engine.sequences += len(group.missing)
        engine.tokens += group.prompt_tokens + group.expected * len(group.missing)
        self._moved(engine)
        return Assignment(engine.name, group.key, tuple(sorted(group.missing)))

    def _take_off(self, group: Group) -> None:
        """A group that runs leaves its engine."""
        engine, group.engine = group.engine, None
        if engine is None:
            return
        del engine.groups[group.key]
        engine.sequences -= len(group.missing)
        engine.tokens -= group.prompt_tokens + group.expected * len(group.missing)
        if self._engines.get(engine.name) is engine:
            self._moved(engine)

    def _fits(self, engine: EngineLoad, group: Group) -> bool:
        free = engine.sequences < engine.capacity
        return free or engine.sequences + len(group.missing) <= engine.capacity + self.reserve

    def _first(self) -> Group | None:
        """The first that still waits at the place where it was put."""
        while self._waiting:
            place, group = self._waiting[0]
            if group.engine is None and group.place == place and self._groups.get(group.key) is group:
                return group
            heappop(self._waiting)
        return None

    def _best(self, group: Group) -> EngineLoad | None:
        """The open engine with the fewest sequences too many, then the least load, of those with new enough weights."""
        tops = []
        for version in [version for version in self._open if version >= group.place[0]]:
            heap = self._open[version]
            while heap and heap[0][-1].stamp != heap[0][2]:
                heappop(heap)
            if heap:
                tops.append(heap[0])
            else:
                del self._open[version]
        return min(tops)[-1] if tops else None

    def _moved(self, engine: EngineLoad) -> None:
        """The load of an engine has changed."""
        if engine.held:
            return
        self._stamps += 1
        engine.stamp = self._stamps
        heap = self._open.setdefault(engine.version, [])
        heappush(heap, _entry(engine, self.group_size))
        if len(heap) > 4 * len(self._engines) + 64:  # mostly void
            heap[:] = [entry for entry in heap if entry[-1].stamp == entry[2]]
            heapify(heap)

    def _lose_version(self, engine: EngineLoad) -> None:
        """An engine gives up the version that it has; the last one takes along what is void there."""
        self._versions[engine.version] -= 1
        if not self._versions[engine.version]:
            del self._versions[engine.version]
            self._open.pop(engine.version, None)


def _entry(engine: EngineLoad, group_size: int) -> tuple[int, float, int, EngineLoad]:
    excess = max(0, engine.sequences + group_size - engine.capacity)
    return excess, engine.tokens / engine.capacity, engine.stamp, engine
