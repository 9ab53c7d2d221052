"""Continuous dispatch: the scheduler gives an engine the next group as soon as it has a sequence free.

A group is one request. What an engine that is lost leaves unfinished goes to others; samples that are there are kept.
So are the beginnings of those that an engine was told to cut: they go on from there, with seeds of their own.
"""

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol

from megatron_r1.errors import EngineError
from megatron_r1.rollout.engine import Sampling
from megatron_r1.rollout.engines import Engines, Work
from megatron_r1.rollout.member import Member
from megatron_r1.rollout.responses import Ask, Response, joined, merged
from megatron_r1.rollout.scheduler import Assignment, Scheduler
from megatron_r1.rollout.server import EngineLostError, WeightsNeededError
from megatron_r1.seeds import stream_seed
from megatron_r1.types import Question

MAX_LOSSES = 8
"""Engines lost with the same group before it is taken for the cause."""


class Owner(Protocol):
    """Who has asked for groups; is told about them on the engines' loop."""

    def sent(self, name: int | str, version: int) -> None:
        """An engine with weights of this version has got what is missing of a group."""
        ...

    def complete(self, name: int | str, responses: list[Response]) -> None:
        """All samples of a group, in order."""
        ...

    def fail(self, error: Exception) -> None:
        """No more groups will be complete."""
        ...


@dataclass(eq=False)
class Asked:
    """A prompt whose samples are not all there."""

    owner: Owner
    name: int | str
    """What the owner calls it."""
    prompt: list[int]
    seeds: list[int]
    """Of each sample."""
    max_tokens: int
    sampling: Sampling
    question: Question | None = None
    """For the tools of a conversation."""
    shares_request: bool = False
    """Whether it may be asked in one request with others: nobody will forget it before them."""
    there: dict[int, Response] = field(default_factory=dict)
    begun: dict[int, Response] = field(default_factory=dict)
    """Beginnings of samples, by their numbers."""
    losses: int = 0
    """Engines that were lost while they had it."""
    request: "asyncio.Task[None] | None" = None

    def rest(self, samples: Sequence[int]) -> Ask:
        """What to ask for to have these samples, each from where it was cut.

        As one prompt with a seed for each; where there are beginnings, as a prompt for each.
        """
        if not self.begun.keys() & set(samples):
            seeds = [self.seeds[sample] for sample in samples]
            questions = [self.question] if self.question else None
            return Ask([self.prompt], [seeds], [self.max_tokens], self.sampling, False, questions)
        had = [self.begun[sample].tokens if sample in self.begun else [] for sample in samples]
        return Ask(
            prompts=[self.prompt + tokens for tokens in had],
            # The same stream again would draw the same numbers as for the beginning.
            seeds=[
                [stream_seed(self.seeds[sample], "resumed", len(tokens)) if tokens else self.seeds[sample]]
                for sample, tokens in zip(samples, had, strict=True)
            ],
            max_tokens=[self.max_tokens - len(tokens) for tokens in had],
            sampling=self.sampling,
            together=False,
        )


@dataclass(eq=False)
class _Running:
    """A `Work` and what is left of it."""

    work: Work
    left: int
    """Groups."""
    end: "asyncio.Future[None]"

    def sent(self, name: int | str, version: int) -> None:
        """Nobody asks."""

    def complete(self, name: int | str, responses: list[Response]) -> None:
        self.work.arrived.put((int(name), responses))
        self.left -= 1
        if not self.left and not self.end.done():
            self.end.set_result(None)

    def fail(self, error: Exception) -> None:
        if not self.end.done():
            self.end.set_exception(error)


class Refill:
    """Runs the scheduler.

    Args:
        engines: the fleet.
        capacity: sequences that an engine runs at once.
    """

    def __init__(self, engines: Engines, capacity: int) -> None:
        self.engines = engines
        self._capacity = capacity
        self._scheduler = Scheduler()
        self._groups: dict[str, Asked] = {}
        self._members: dict[str, Member] = {}
        """By the name of its present life, as the scheduler knows it."""
        self._works = count()
        self.newer: list[Callable[[int], None]] = []
        """Called, on the loop, with the version of weights that an engine has got."""
        for member in engines.members:
            if member.ready:
                self.joined(member)
        engines.watcher = self

    async def run(self, work: Work) -> None:
        """Have all of it answered.

        Raises:
            EngineError: no engine is left, too many were lost with the same group, or one refuses.
        """
        number, running = next(self._works), _Running(work, len(work.prompts), asyncio.Future())
        samples = max(map(len, work.seeds))
        self._scheduler.group_size = self._scheduler.reserve = samples  # the next group is there when one ends
        keys = [f"{number}.{index}" for index in range(len(work.prompts))]
        try:
            for index, key in enumerate(keys):
                parts = (work.prompts[index], work.seeds[index], work.max_tokens[index], work.sampling)
                question = work.questions[index] if work.questions else None
                asked = Asked(running, index, *parts, question, shares_request=True)
                self._queue(key, asked, self.engines.weights.version)
            self._send()
            hopeless = asyncio.create_task(self.hopeless())
            ends: set[asyncio.Future[Any]] = {running.end, hopeless}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            hopeless.cancel()
            if not running.end.done():
                raise hopeless.result()
            running.end.result()
        finally:
            self.forget(keys)

    @property
    def asked(self) -> Collection[Asked]:
        """Groups that are not complete. On the loop, as `add` and `forget`."""
        return self._groups.values()

    def add(self, key: str, asked: Asked, at_least: int) -> None:
        """One more group, for weights of some version or newer."""
        self._scheduler.group_size = self._scheduler.reserve = len(asked.seeds)
        self._queue(key, asked, at_least)
        self._send()

    def forget(self, keys: Sequence[str]) -> None:
        """Groups that are not wanted any more, if they are not complete; engines are told to abort them."""
        known = {key: self._groups.pop(key) for key in keys if key in self._groups}
        for key, asked in known.items():
            self._scheduler.cancel(key)
            if asked.request:
                asked.request.cancel()
        self._send()  # others get their places

    async def hopeless(self, known: Sequence[int] = ()) -> EngineError:
        """Wait until nobody is left to answer; returns why, as `why_hopeless`.

        `known`: what `lives` was when it was told before that engines wait for weights, which is not told again.
        """

        def news() -> bool:
            why = self.why_hopeless()
            return why is not None and not (isinstance(why, WeightsNeededError) and self.lives == known)

        await self.engines.until(news)
        return self.why_hopeless() or EngineError("all engines are gone")

    def why_hopeless(self) -> EngineError | None:
        """All engines are given up, or wait themselves for weights: `WeightsNeededError`. On the loop."""
        members = self.engines.members
        if not all(member.gone or member.waiting for member in members):
            return None
        if any(member.waiting for member in members):
            return WeightsNeededError("no engine is left that has weights")
        return members[-1].error or EngineError("all engines are gone")

    @property
    def lives(self) -> list[int]:
        """Starts and returns of each engine so far: one that waits for weights again has another number."""
        return [member.life for member in self.engines.members]

    def joined(self, member: Member) -> None:
        """See `Watcher`, as for the next two."""
        name = _name(member)
        if name in self._members:
            self._scheduler.release(name, member.version)
        else:
            self._members[name] = member
            self._scheduler.joined(name, self._capacity, member.version)
        for tell in self.newer:
            tell(member.version)
        self._send()

    def held(self, member: Member) -> None:
        self._scheduler.hold(_name(member))

    def left(self, member: Member) -> None:
        del self._members[_name(member)]
        for key in self._scheduler.left(_name(member)):
            asked = self._groups[str(key)]
            self.engines.samples_again += len(self._scheduler.groups[key].missing)
            asked.losses += 1
            if asked.losses > MAX_LOSSES and member.error:
                asked.owner.fail(member.error)
            if asked.request and asked.request is not asyncio.current_task():
                asked.request.cancel()
        self._send()

    def _queue(self, key: str, asked: Asked, at_least: int) -> None:
        self._groups[key] = asked
        samples, there = len(asked.seeds), asked.there.keys()
        self._scheduler.submit(key, len(asked.prompt), samples, asked.max_tokens, at_least, there=there)

    def _send(self) -> None:
        requests: dict[tuple[object, str], list[tuple[Assignment, Asked]]] = {}
        for assignment in self._scheduler.assign():
            asked = self._groups[str(assignment.key)]
            asked.owner.sent(asked.name, self._members[assignment.engine].version)
            shared = id(asked.owner) if asked.shares_request else assignment.key
            requests.setdefault((shared, assignment.engine), []).append((assignment, asked))
        for (_, engine), groups in requests.items():
            request = asyncio.ensure_future(self._ask(engine, groups))
            for _, asked in groups:
                asked.request = request

    async def _ask(self, engine: str, groups: list[tuple[Assignment, Asked]]) -> None:
        """Ask an engine for groups of one owner."""
        owner = groups[0][1].owner
        request = merged([asked.rest(assignment.samples) for assignment, asked in groups])
        self.engines.resumed += sum(len(asked.begun.keys() & set(given.samples)) for given, asked in groups)
        places = [(prompt, number) for prompt, seeds in enumerate(request.seeds) for number in range(len(seeds))]
        wanted = [(str(given.key), asked, sample) for given, asked in groups for sample in given.samples]
        at = dict(zip(places, wanted, strict=True))

        def take(response: Response) -> None:
            key, asked, sample = at[response.prompt, response.sample]
            whole = joined(asked.begun.get(sample), response)
            if response.finish_reason == "abort":
                if response.tokens and self._has(engine, key):
                    asked.begun[sample] = whole.model_copy(update={"sample": sample})
                return
            outcome = self._scheduler.finished(engine, key, sample, len(whole.tokens))
            if outcome == "ignored":
                return
            asked.begun.pop(sample, None)
            asked.there[sample] = whole.model_copy(update={"sample": sample})
            if outcome == "complete":
                del self._groups[key]
                owner.complete(asked.name, [asked.there[number] for number in sorted(asked.there)])
            self._send()

        try:
            await self.engines.ask(self._members[engine], request, take)
            cut = [str(given.key) for given, _ in groups if self._has(engine, str(given.key))]
            for key in cut:
                self._scheduler.returned(key)
            if cut:
                self._send()
        except EngineLostError:
            pass  # `left` has put the groups back
        except Exception as error:  # an engine that refuses, or a defect: who has asked is told
            owner.fail(error)

    def _has(self, engine: str, key: str) -> bool:
        """Whether an engine still has a group."""
        group = self._scheduler.groups.get(key)
        return group is not None and group.engine is not None and group.engine.name == engine


def _name(member: Member) -> str:
    return f"{member.name}.{member.life}"
