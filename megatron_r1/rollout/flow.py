"""Groups without end: asked one by one from any thread, and told about in the order in which things happen.

Where `Fleet.stream` answers one batch, a flow lets generation go on while the learner trains. It says what the rule of
`admission.py` needs to know: which weights have begun a group, when it is complete, when engines have newer weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from megatron_r1.config.asynchrony import WeightsChange
from megatron_r1.errors import EngineError
from megatron_r1.rollout.engine import Decode, Sampling
from megatron_r1.rollout.engines import Engines
from megatron_r1.rollout.refill import Asked, Refill
from megatron_r1.rollout.responses import Response, to_sample
from megatron_r1.rollout.server import WeightsNeededError
from megatron_r1.types import Question, Sample


@dataclass(frozen=True)
class Sent:
    """An engine has got a group, or what was missing of it."""

    key: str
    version: int
    """Of its weights."""


@dataclass(frozen=True)
class Complete:
    """All samples of a group are there."""

    key: str
    samples: list[Sample]


@dataclass(frozen=True)
class Newer:
    """An engine has weights of this version."""

    version: int


@dataclass(frozen=True)
class Weightless:
    """No engine has weights, so nothing more will be complete before the next push."""


@dataclass(frozen=True)
class Failed:
    """Nothing more will be complete."""

    error: Exception


Event = Sent | Complete | Newer | Weightless | Failed


@dataclass(frozen=True)
class _There:
    """As `Complete`, before anybody has read it."""

    key: str
    responses: list[Response]


_Said = Sent | _There | Newer | Weightless | Failed


class Flow:
    """One at a time; its methods may be called from any thread.

    Args:
        engines: the fleet.
        refill: its dispatch.
        sampling: how all of it is drawn.
        decode: token ids -> text, for `Sample.text`.
        room: longest response to a prompt that weights of a version begin, tokens.
        weights_change: what becomes of responses that are under way when there are new weights.
    """

    def __init__(
        self,
        engines: Engines,
        refill: Refill,
        sampling: Sampling,
        decode: Decode,
        room: Callable[[list[int], int], int],
        weights_change: WeightsChange = "in_flight",
    ) -> None:
        self._engines, self._refill, self._room = engines, refill, room
        self._sampling, self._decode = sampling, decode
        self._events: SimpleQueue[_Said | None] = SimpleQueue()
        self._complete: dict[str, list[Response]] = {}
        """Groups that the caller was not told of, or may not be done with."""
        self._told: list[str] = []
        """Those among the last events."""
        self._watching = engines.start(self._open(weights_change))

    def submit(
        self,
        key: str,
        prompt: list[int],
        seeds: list[int],
        at_least: int,
        question: Question | None = None,
        had: Sequence[Response] = (),
    ) -> None:
        """Ask for a group, of weights of a version or newer.

        Args:
            key: its name.
            prompt: token ids.
            seeds: of each sample.
            at_least: version of the oldest weights that may answer from here on.
            question: what the prompt asks, for the tools of a conversation.
            had: samples of an earlier run, whole or as far as they were; nothing else of it is there.

        Raises:
            DataError: the prompt leaves no room for a response.
        """
        room = self._room(prompt, at_least)
        asked = Asked(self, key, prompt, seeds, room, self._sampling, question)
        fit = [one for one in had if one.sample < len(seeds) and _fits(one, room)]
        for response in fit if len(fit) == len(had) else ():  # a run that asks for less begins it anew
            (asked.begun if response.finish_reason == "abort" else asked.there)[response.sample] = response
        if len(asked.there) == len(seeds):
            self._engines.soon(self.complete, key, [asked.there[sample] for sample in sorted(asked.there)])
        else:
            self._engines.soon(self._refill.add, _name(key), asked, at_least)

    def cancel(self, keys: Sequence[str]) -> None:
        """Groups that are not wanted any more; what has been said of them may still be among the events."""
        self._engines.soon(self._refill.forget, [_name(key) for key in keys])

    def had(self) -> dict[str, list[Response]]:
        """What there is of groups: whole samples, and those that were cut as far as they are.

        Of all groups but those that are complete and that the caller is done with: it was told, and has called `events`
        again.
        """
        return self._engines.start(self._had()).result()

    def hopeless(self) -> EngineError | None:
        """Why nobody is there to answer at this moment; `WeightsNeededError` until the next push."""
        return self._engines.start(self._hopeless()).result()

    def events(self) -> list[Event]:
        """What has happened since the last call, at least one thing; nothing once the flow is closed.

        For one thread, which is done with what the last call returned when it makes the next.
        """
        for key in self._told:
            self._complete.pop(key, None)
        found = [self._events.get()]
        while True:
            try:
                found.append(self._events.get_nowait())
            except Empty:
                break
        self._told = [event.key for event in found if isinstance(event, _There)]
        return [] if None in found else [self._read(event) for event in found if event is not None]

    def close(self) -> None:
        """Wake who waits for events."""
        self._watching.cancel()
        self._events.put(None)

    def sent(self, name: int | str, version: int) -> None:
        """See `Owner`, as for the next two."""
        self._events.put(Sent(str(name), version))

    def complete(self, name: int | str, responses: list[Response]) -> None:
        self._complete[str(name)] = responses
        self._events.put(_There(str(name), responses))

    def fail(self, error: Exception) -> None:
        self._events.put(Failed(error))

    async def _had(self) -> dict[str, list[Response]]:
        mine = [asked for asked in self._refill.asked if asked.owner is self]
        begun = {str(one.name): [*one.there.values(), *one.begun.values()] for one in mine if one.there or one.begun}
        return dict(self._complete) | begun

    async def _open(self, weights_change: WeightsChange) -> None:
        def newer(version: int) -> None:
            self._events.put(Newer(version))

        self._refill.newer.append(newer)
        self._engines.weights_change = weights_change
        try:
            error = await self._refill.hopeless()
            while isinstance(error, WeightsNeededError):
                known = self._refill.lives
                self._events.put(Weightless())
                error = await self._refill.hopeless(known)
            self.fail(error)
        finally:
            self._refill.newer.remove(newer)

    async def _hopeless(self) -> EngineError | None:
        return self._refill.why_hopeless()

    def _read(self, event: _Said) -> Event:
        if isinstance(event, _There):
            return Complete(event.key, [to_sample(response, self._decode) for response in event.responses])
        return event


def _fits(response: Response, room: int) -> bool:
    """Whether a response of an earlier run is one in this room, or the beginning of one."""
    return len(response.tokens) < room + (response.finish_reason != "abort")


def _name(key: str) -> str:
    """What the dispatch calls it, where there are those of `Fleet.stream`, too."""
    return f"flow/{key}"
