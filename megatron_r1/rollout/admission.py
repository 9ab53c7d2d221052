"""How far generation may run ahead of training, as a rule without I/O; and the ledger of what is in flight.

Step s = 0, 1, ... trains on `batch` groups and makes the weights of version s + 1. With `max_staleness` k, a group that
weights of version v have begun is trained on at a step s <= v + k:

* The group in place number g (trained ones included) may only be begun by weights of version g // batch - k or newer.
  So at most (version + k + 1) batch groups are begun while the newest weights are `version`.
* Step s takes complete groups, those of the oldest weights first. It waits until, for each j = 0 ... k, at most j batch
  groups of version s - k + j and older are not complete: they have to fit into the j steps after it. (To wait for those
  that are due now, j = 0, is not enough: too many could be due together later.)

k = 0 is the synchronous loop: the groups of step s are begun with version s, and all of them are waited for.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_r1.rollout.scheduler import Key

Late = Literal["wait", "drop", "keep"]
"""What a step does about groups that it would have to wait for: wait; do without them, and replace them by others; or
train on them later all the same."""


@dataclass(slots=True)
class Begun:
    """A group that is begun and not trained on."""

    key: Key
    version: int
    """Of the weights that have begun it; while it waits for an engine, the oldest that may."""
    sent: bool = False
    finished: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """What a step trains on."""

    number: int
    groups: list[Key]
    """In the order in which they were begun."""
    dropped: list[Key] = field(default_factory=list)
    """Too old from now on: engines may forget them, and the next that are begun take their places."""


class Admission:
    """Says how many groups may begin, and which a step trains on.

    Args:
        batch: groups of a step.
        max_staleness: k; steps between the weights that begin a group and those that it trains, at most.
        late: what to do about groups that a step has to wait for; "drop" favours short answers, "keep" gives up the
            bound (and counts).
        extra: groups begun beyond those that steps have room for, not with "wait": the first to be complete are taken.
        steps: of the whole run, beyond which none is begun; None = without end.
    """

    def __init__(
        self, batch: int, max_staleness: int, late: Late = "wait", extra: int = 0, steps: int | None = None
    ) -> None:
        if batch < 1 or max_staleness < 0 or extra < 0 or (extra and late == "wait"):
            raise ValueError(f"batch {batch}, max_staleness {max_staleness}, late {late!r}, extra {extra}")
        self.batch, self.max_staleness, self.late, self.extra, self.steps = batch, max_staleness, late, extra, steps
        self.version = 0
        """Of the newest weights that engines have."""
        self.step = 0
        """The next to be trained."""
        self.dropped = 0
        """Groups that were begun and will not be trained on."""
        self.staleness: Counter[int] = Counter()
        """Groups trained on, by the steps between the weights that began them and those that they trained."""
        self._live: dict[Key, Begun] = {}
        self._finished: dict[Key, None] = {}
        """In order of completion."""
        self._unfinished: Counter[int] = Counter()
        """Groups that are not complete, by version."""

    @property
    def live(self) -> Collection[Begun]:
        """Groups begun and not trained on, in the order in which they were begun."""
        return self._live.values()

    @property
    def room(self) -> int:
        """Groups that may begin now."""
        if self.version < self.step - self.max_staleness:  # too old for the next step
            return 0
        steps = self.version + self.max_staleness + 1
        if self.steps is None:
            return max(0, steps * self.batch + self.extra - self._places())
        room = min(steps, self.steps) * self.batch + self.extra - self._places()
        if self.late == "keep":  # nothing is dropped, so all that is begun has to find its step
            room = min(room, self.steps * self.batch - self._places())
        return max(0, room)

    @property
    def ready(self) -> bool:
        """Whether `take` has groups for the next step."""
        return len(self._finished) >= self.batch and not (self.late == "wait" and self._behind())

    def begin(self, key: Key) -> int:
        """A group takes the next place; returns the version of the oldest weights that may begin it."""
        if key in self._live or not self.room:
            raise ValueError(f"group {key!r} is begun already, or there is no room for it")
        step = max(self.step, (self._places() - self.extra) // self.batch)
        at_least = max(0, step - self.max_staleness)
        self._live[key] = Begun(key, at_least)
        self._unfinished[at_least] += 1
        return at_least

    def sent(self, key: Key, version: int) -> None:
        """An engine with weights of this version has got the group, or what was missing of it."""
        group = self._live[key]
        if not group.sent and version < group.version:
            raise ValueError(f"group {key!r} is for weights {group.version} and newer, not {version}")
        if not group.sent or version < group.version:  # it is as old as the oldest weights that made some of it
            self._unfinished[group.version] -= 1
            self._unfinished[version] += 1
            group.version, group.sent = version, True

    def finished(self, key: Key) -> None:
        """All samples of a group are there."""
        group = self._live[key]
        if not group.sent or group.finished:
            raise ValueError(f"group {key!r} was not sent, or has finished already")
        group.finished = True
        self._finished[key] = None
        self._unfinished[group.version] -= 1

    def discard(self, key: Key) -> None:
        """A group will not be trained on (all its rewards are equal, it can't be answered): another takes its place."""
        self._forget(key)
        self.dropped += 1

    def take(self) -> Step | None:
        """The groups of the next step; None as long as it has to wait."""
        if not self.ready:
            return None
        oldest_first = sorted(self._finished, key=lambda key: self._live[key].version)  # stable: then by completion
        chosen = set(oldest_first[: self.batch])
        groups = [key for key in self._live if key in chosen]
        for key in groups:
            self.staleness[self.step - self._live[key].version] += 1
            self._forget(key)
        due = self.step - self.max_staleness
        dropped = [key for key, group in self._live.items() if self.late == "drop" and group.version <= due]
        for key in dropped:
            self.discard(key)
        self.step += 1
        return Step(self.step - 1, groups, dropped)

    def published(self, version: int) -> None:
        """Engines have weights of this version, at least the first of them: `sent` says which has begun a group."""
        if not self.version <= version <= self.step:
            raise ValueError(f"version {version} after {self.version}, before step {self.step}")
        self.version = version

    def state(self) -> dict[str, Any]:
        """The ledger as JSON, for the checkpoint of the weights that the steps taken so far have made."""
        places = {key: place for place, key in enumerate(self._finished)}
        return {
            "step": self.step,
            "dropped": self.dropped,
            "staleness": sorted(self.staleness.items()),
            "live": [[group.key, group.version, places.get(group.key)] for group in self.live],
        }

    def restore(self, state: dict[str, Any], saved: Collection[Key], begun: Collection[Key] = ()) -> list[Key]:
        """Go on from where a `state` was, with engines that have the weights of that checkpoint.

        Args:
            state: of a run with the same batch and bound.
            saved: finished groups whose samples were saved, too.
            begun: groups that are not finished and of which something was saved: they stay as old as it is.

        Returns:
            What has to be sent again, in order, to weights of version `step`: begun and not finished, or not saved.
        """
        self.step = self.version = state["step"]
        self.dropped, self.staleness = state["dropped"], Counter(dict(state["staleness"]))
        there = [(place, key) for key, _, place in state["live"] if place is not None and key in saved]
        self._finished = {key: None for _, key in sorted(there)}
        self._live = {
            key: Begun(key, version, sent=True, finished=key in self._finished)
            if key in self._finished or key in begun
            else Begun(key, self.step)
            for key, version, _ in state["live"]
        }
        again = [group for group in self._live.values() if not group.finished]
        self._unfinished = Counter(group.version for group in again)
        return [group.key for group in again]

    def _behind(self) -> bool:
        """Whether too many groups that this step and the next ones need are not complete."""
        due = self.step - self.max_staleness
        self._unfinished = +self._unfinished  # without versions that are done with
        unfinished = sum(count for version, count in self._unfinished.items() if version < due)
        for steps_left in range(self.max_staleness + 1):
            unfinished += self._unfinished[due + steps_left]
            if unfinished > steps_left * self.batch:
                return True
        return False

    def _places(self) -> int:
        return self.step * self.batch + len(self._live)

    def _forget(self, key: Key) -> None:
        group = self._live.pop(key)
        if group.finished:
            del self._finished[key]
        else:
            self._unfinished[group.version] -= 1
