"""What goes on while the learner trains, on the first rank: groups are begun, sampled and judged, and wait for a step.

A thread reads what the fleet says (`rollout/flow.py`), tells the rule of `rollout/admission.py`, has complete groups
judged, and begins new ones where there is room. The learner's thread waits until a step may be taken, and takes it.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from megatron_r1.errors import EngineError
from megatron_r1.report.rollout_figures import uniform
from megatron_r1.rollout.admission import Admission
from megatron_r1.rollout.flow import Complete, Event, Failed, Newer, Sent, Weightless
from megatron_r1.rollout.responses import Response
from megatron_r1.train import kept_groups
from megatron_r1.types import Group, Question

CLOSE_SECONDS = 5.0


class Asker(Protocol):
    """What a feed asks of the fleet: see `rollout.flow.Flow`."""

    def submit(
        self,
        key: str,
        prompt: list[int],
        seeds: list[int],
        at_least: int,
        question: Question,
        had: Sequence[Response] = (),
    ) -> None: ...

    def had(self) -> dict[str, list[Response]]: ...

    def hopeless(self) -> EngineError | None: ...

    def cancel(self, keys: Sequence[str]) -> None: ...

    def events(self) -> list[Event]: ...

    def close(self) -> None: ...


class Order(Protocol):
    """Which question is begun next: see `ahead.Deal`."""

    def begin(self) -> str: ...

    def replace(self, key: str) -> None: ...

    def question(self, key: str) -> Question: ...

    def state(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Service:
    """What a feed has done by others."""

    asker: Asker
    prompt: Callable[[Question], list[int]]
    """Token ids of a question."""
    seeds: Callable[[str], list[int]]
    """Of each sample of a group."""
    score: Callable[[Sequence[Group]], None]
    """Judges groups."""


@dataclass(frozen=True)
class Taken:
    """What a step trains on."""

    keys: list[str]
    groups: list[Group]
    replaced: list[Group]
    """Groups that were sampled meanwhile and had no advantage."""
    dropped: int
    """Groups that were too old."""


class Feed:
    """A context manager: from its beginning groups are sampled, at its end no more.

    Args:
        admission: the rule.
        order: of questions.
        service: what samples and scores.
        replaceable: groups with equal rewards that may be replaced by others for one step (dynamic sampling).
        begun: what a `state` has said.
    """

    def __init__(
        self,
        admission: Admission,
        order: Order,
        service: Service,
        replaceable: int = 0,
        begun: dict[str, Any] | None = None,
    ) -> None:
        self._admission, self._order, self._service = admission, order, service
        self._replaceable = replaceable
        self._changed = threading.Condition()
        self._begun: dict[str, Group] = {}
        """Not complete."""
        self._complete: dict[str, Group] = {}
        """And judged."""
        self._replaced: list[Group] = []
        self._replacements = 0
        """For the next step."""
        self._weightless = False
        """Whether engines have said that they wait for weights, which may have come since."""
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)
        again = self._restore(begun) if begun else {}
        for key, had in again.items():
            self._send(key, admission.version, had)
        self._fill()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._service.asker.close()
        self._thread.join(CLOSE_SECONDS)

    def wait(self) -> None:
        """Until there are groups for the next step.

        Raises:
            WeightsNeededError: it needs a push first; may be called again after it.
            Exception: whatever has ended the thread.
        """
        with self._changed:
            while not self._admission.ready:
                if self._error:
                    raise self._error
                if self._weightless and (error := self._service.asker.hopeless()):
                    raise error
                self._changed.wait()

    def take(self) -> Taken | None:
        """The groups of the next step; None where it has to wait, after all."""
        with self._changed:
            step = self._admission.take()
            if step is None:
                return None
            groups = [self._complete.pop(str(key)) for key in step.groups]
            dropped = [str(key) for key in step.dropped]
            for key in dropped:
                self._complete.pop(key, None)
                self._begun.pop(key, None)
                self._order.replace(key)
            self._service.asker.cancel(dropped)
            replaced, self._replaced, self._replacements = self._replaced, [], 0
            self._fill()
        return Taken([str(key) for key in step.groups], groups, replaced, len(dropped))

    def state(self) -> dict[str, Any]:
        """What is in flight, for a checkpoint of the weights that all steps taken have made."""
        with self._changed:
            had = self._service.asker.had()
            return {
                "ledger": self._admission.state(),
                "order": self._order.state(),
                "replacements": self._replacements,
                "groups": {key: kept_groups.pack(group) for key, group in self._complete.items()},
                "begun": {key: kept_groups.pack_begun(had[key]) for key in self._begun if key in had},
            }

    def _restore(self, state: dict[str, Any]) -> dict[str, list[Response]]:
        """Returns what has to be asked again, with what there is of it."""
        self._replacements = state["replacements"]
        for key, packed in state["groups"].items():
            question = self._order.question(key)
            self._complete[key] = kept_groups.unpack(packed, question, self._service.prompt(question))
        begun = {key: kept_groups.unpack_begun(packed) for key, packed in state.get("begun", {}).items()}
        again = self._admission.restore(state["ledger"], self._complete.keys(), begun.keys())
        return {str(key): begun.get(str(key), []) for key in again}

    def _run(self) -> None:
        try:
            while events := self._service.asker.events():
                if arrived := self._note(events):
                    self._service.score(list(arrived.values()))
                    self._finish(arrived)
        except Exception as error:  # the learner's thread raises it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _note(self, events: Sequence[Event]) -> dict[str, Group]:
        """Tell the rule what has happened; returns groups that are complete and not judged."""
        arrived: dict[str, Group] = {}
        with self._changed:
            for event in events:
                match event:
                    case Sent(key, version) if key in self._begun:
                        self._admission.sent(key, version)
                    case Complete(key, samples) if key in self._begun:
                        self._begun[key].samples = samples
                        arrived[key] = self._begun[key]
                    case Newer(version):
                        self._weightless = False
                        if version > self._admission.version:
                            self._admission.published(version)
                    case Weightless():
                        self._weightless = True
                    case Failed(error):
                        raise error
            self._fill()
            self._changed.notify_all()
        return arrived

    def _finish(self, judged: dict[str, Group]) -> None:
        with self._changed:
            for key, group in judged.items():
                if self._begun.pop(key, None) is None:  # dropped meanwhile
                    continue
                if self._replacements < self._replaceable and uniform(group):
                    self._admission.discard(key)
                    self._order.replace(key)
                    self._replaced.append(group)
                    self._replacements += 1
                else:
                    self._admission.finished(key)
                    self._complete[key] = group
            self._fill()
            self._changed.notify_all()

    def _fill(self) -> None:
        """Begin as many groups as there is room for."""
        while self._admission.room:
            key = self._order.begin()
            self._send(key, self._admission.begin(key))

    def _send(self, key: str, at_least: int, had: Sequence[Response] = ()) -> None:
        question = self._order.question(key)
        prompt = self._service.prompt(question)
        self._begun[key] = Group(question, prompt, [])
        self._service.asker.submit(key, prompt, self._service.seeds(key), at_least, question, had)
