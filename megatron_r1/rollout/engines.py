"""The engines of a fleet on an event loop of their own: asked, watched, restarted, kept on the right weights.

An engine that refuses connections, breaks them off, says that its core is dead, is silent for `stall_timeout`, or gives
an answer that no working engine gives, is lost: what it was asked for fails with `EngineLostError`, and it is started
again (one at an address is waited for), brought to the newest weights and only then asked again.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

import httpx

from megatron_r1.config.asynchrony import WeightsChange
from megatron_r1.config.sections import RolloutSection
from megatron_r1.errors import EngineError
from megatron_r1.report.spans import lane
from megatron_r1.rollout.client import KEEPALIVE_SECONDS
from megatron_r1.rollout.conversation import Conversation
from megatron_r1.rollout.engine import Sampling
from megatron_r1.rollout.fan_out import TransferError
from megatron_r1.rollout.member import Member, Weights
from megatron_r1.rollout.meters import Busy
from megatron_r1.rollout.responses import Ask, GarbageError, Response, ask
from megatron_r1.rollout.server import EngineLostError
from megatron_r1.types import Question

T = TypeVar("T")
CLOSE_SECONDS = 5.0
THREADS = 4
"""For each engine: one loads weights or starts it again, one asks for its health; there is room for what all do."""
DRAIN_SECONDS = 0.02
"""Between two looks at an engine that is to take new weights when it has done its work."""

logger = logging.getLogger(__name__)


@dataclass
class Work:
    """One call of `Fleet.stream`."""

    prompts: list[list[int]]
    seeds: list[list[int]]
    """Of each sample of each prompt. [prompts][n]"""
    max_tokens: list[int]
    sampling: Sampling
    questions: list[Question] | None = None
    """Of each prompt, for the tools of a conversation."""
    arrived: "SimpleQueue[tuple[int, list[Response]] | None]" = field(default_factory=SimpleQueue)
    """Number of a prompt and all its samples, in order; None = there is nothing more to come."""


class Watcher(Protocol):
    """Is told what happens to engines, on their loop."""

    def joined(self, member: Member) -> None:
        """An engine has the newest weights and can be asked."""
        ...

    def held(self, member: Member) -> None:
        """An engine is given new weights."""
        ...

    def left(self, member: Member) -> None:
        """An engine is lost."""
        ...


class Engines:
    """Asks engines, and brings back those that are lost.

    Args:
        members: engines that are ready.
        section: the run file's [rollout].
        weights: what they hold.
    """

    def __init__(self, members: list[Member], section: RolloutSection, weights: Weights) -> None:
        self.members, self.section, self.weights = members, section, weights
        self.watcher: Watcher | None = None
        self.conversation: Conversation | None = None
        """What holds the requests that have questions."""
        self.lost = self.returned = self.samples_again = 0
        """Since the fleet began: engines lost, engines that came back, samples that were asked for once more."""
        self.weights_change: WeightsChange = "in_flight"
        """What becomes of samples that engines have when there are new weights: they go on, they are given back as far
        as they are, or they are finished first."""
        self.resumed = 0
        """Samples that were asked for from where they had been cut."""
        self._draining: set[str] = set()
        self._loading = 0
        """Engines that load by themselves: they had drained, or have come back."""
        self.asleep = False
        """Have they given their GPUs' memory back?"""
        self._busy = Busy()
        for member in members:
            member.version, member.ready = weights.version, True
        self._loop = asyncio.new_event_loop()
        # By itself it has a few threads for each core, and engines would wait for one another's loads and restarts.
        self._threads = ThreadPoolExecutor(THREADS * len(members), thread_name_prefix="fleet")
        self._loop.set_default_executor(self._threads)
        self._thread = threading.Thread(target=self._loop.run_forever, name="fleet", daemon=True)
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        limits = httpx.Limits(max_connections=None, keepalive_expiry=KEEPALIVE_SECONDS)
        self._http = httpx.AsyncClient(limits=limits, trust_env=False)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Run something on the loop, from another thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def soon(self, act: Callable[..., object], *arguments: Any) -> None:
        """Call something on the loop, from any thread; calls keep their order."""
        self._loop.call_soon_threadsafe(act, *arguments)

    async def ask(self, member: Member, request: Ask, take: Callable[[Response], None]) -> None:
        """Ask an engine for samples; each goes to `take` as soon as it is there, with all its turns.

        Raises:
            EngineLostError: the engine was lost.
            EngineError: it works, and refuses.
        """
        left = sum(map(len, request.seeds))
        self._asked(member, left)

        def taken(response: Response) -> None:
            nonlocal left
            left -= 1
            self._asked(member, -1)
            member.meter.answered(len(response.logprobs))
            take(response)

        try:
            if self.conversation and request.questions:
                await self.conversation.hold(partial(self._ask, member), request, taken)
            else:
                await self._ask(member, request, taken)
        finally:
            self._asked(member, -left)

    async def _ask(self, member: Member, request: Ask, take: Callable[[Response], None]) -> None:
        life, url, stall = member.life, member.server.url, self.section.stall_timeout
        if not member.server.alive():  # without its supervisor the server goes on, and would outlive the run
            raise self.lose(member, life, "has ended, or lost the process that ends it with the run")
        meanwhile = _Meanwhile(self, member, member.version)
        answers = ask(self._http, url, member.token, request, stall, meanwhile)

        async def read() -> None:
            async with aclosing(answers):
                async for response in answers:
                    take(response)

        try:
            async with asyncio.timeout(self.section.request_timeout):
                await member.health.while_there(read())
            member.failures = 0
        except httpx.HTTPStatusError as error:
            what = f"answered a request for samples with {error.response.status_code}: {error}"
            if error.response.is_client_error:
                raise member.server.failure(what) from error
            raise self.lose(member, life, what) from error
        except GarbageError as error:
            raise self.lose(member, life, f"answered a request for samples with {error}") from error
        except httpx.ReadTimeout as error:
            raise self.lose(member, life, f"gave no sign of life for {stall:g} s") from error
        except httpx.HTTPError as error:
            raise self.lose(member, life, f"has died, or cannot be reached ({error!r})") from error
        except TimeoutError as error:
            what = f"did not answer a request for samples within {self.section.request_timeout:g} s"
            raise self.lose(member, life, what) from error

    async def update_weights(self, path: Path, version: int) -> None:
        """Give them new weights; engines that are lost on the way, or before, get these when they come back.

        At group borders they get them later: each when it has done what it was asked for, and nothing new until then.

        Raises:
            TransferError: an engine refuses them.
        """
        self.weights = Weights(version, path)
        self.look_again()
        ready, outcomes = [member for member in self.members if member.ready], list[BaseException | None]()
        for member in ready:
            if self.watcher:
                self.watcher.held(member)
        if self.weights_change == "at_group_borders":
            for member in ready:
                if member.name not in self._draining:
                    self._spawn(self._load_when_done(member))
        else:
            outcomes = await asyncio.gather(*(self._load(member) for member in ready), return_exceptions=True)
        while self._loading:  # perhaps from the file that will be written next
            await asyncio.sleep(DRAIN_SECONDS)
        for refused in filter(None, outcomes):  # when all have ended: the next push may follow at once
            raise refused

    def look_again(self) -> None:
        """For engines at addresses that were given up."""
        for member in self.members:
            if member.gone and member.remote:
                member.gone, member.failures = False, 0
                self._spawn(self._bring_back(member))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that depends on engines that come back or are given up."""
        async with self._changed:
            await self._changed.wait_for(condition)

    async def idle(self) -> float:
        """Share of the time since the last call in which an engine had nothing to do, mean over engines."""
        return 1 - self._busy.mean() / len(self.members)

    async def figures(self) -> dict[str, float]:
        """Counts since the fleet began; of each engine its weights, and what its meter says (`Meter.figures`)."""
        counts = {
            "engines_ready": float(sum(member.ready for member in self.members)),
            "engines_lost": float(self.lost),
            "engines_returned": float(self.returned),
            "samples_again": float(self.samples_again),
            "samples_resumed": float(self.resumed),
        }
        by_engine = ((one.name, one.meter.figures() | {"weights": float(one.version)}) for one in self.members)
        return counts | {f"{engine}/{name}": value for engine, found in by_engine for name, value in found.items()}

    def close(self) -> None:
        """End every engine of the run, and the loop."""
        for member in self.members:
            member.terminate()  # all at once, so that they end in parallel
        if self._thread.is_alive():
            with suppress(TimeoutError):
                self.start(self._end()).result(CLOSE_SECONDS)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CLOSE_SECONDS)
        self._threads.shutdown(wait=False, cancel_futures=True)
        for member in self.members:
            member.close()

    async def _load(self, member: Member) -> None:
        life = member.life
        try:
            if self.weights_change == "partial_rollouts":
                await self.cut(member)
                if member.life != life or not member.ready:
                    return
            with member.asleep(), lane(member.name):
                await asyncio.to_thread(member.load, self.weights)
        except EngineLostError as error:
            self.lose(member, life, error)
        except EngineError as error:
            text = f"weights {self.weights.version} in {self.weights.path}: {member.name} does not take them: {error}"
            raise TransferError(text) from error
        else:
            if member.ready and member.life == life and self.watcher:
                self.watcher.joined(member)

    async def cut(self, member: Member) -> None:
        """Have it give back all that it was asked for, as far as it is.

        Raises:
            EngineLostError: it does not.
        """
        life, deadline = member.life, time.monotonic() + self.section.stall_timeout
        member.cut = True
        try:
            with lane(member.name):
                # Once more for a request that was on its way when the engine was told.
                while member.meter.queue and member.life == life and member.ready:
                    if time.monotonic() > deadline:
                        raise EngineLostError(member.server.failure("does not give back what it was asked for"))
                    await asyncio.to_thread(member.client.cut)
                    await asyncio.sleep(DRAIN_SECONDS)
        finally:
            member.cut = False

    async def _load_when_done(self, member: Member) -> None:
        """The newest weights, once nothing is left that the engine was asked for."""
        life = member.life
        self._draining.add(member.name)
        try:
            while member.meter.queue and member.life == life and member.ready:
                await asyncio.sleep(DRAIN_SECONDS)
            while member.version != self.weights.version and member.life == life and member.ready:
                with self._counted_as_loading(), member.asleep(), lane(member.name):
                    await asyncio.to_thread(member.load, self.weights, late=True)
        except (EngineError, OSError) as error:
            said = error if isinstance(error, EngineError) else member.server.failure(f"failed ({error})")
            self.lose(member, life, said if isinstance(said, EngineLostError) else EngineLostError(said))
        finally:
            self._draining.remove(member.name)
        if member.ready and member.life == life and self.watcher:
            self.watcher.joined(member)

    @contextmanager
    def _counted_as_loading(self) -> Iterator[None]:
        self._loading += 1
        try:
            yield
        finally:
            self._loading -= 1

    def _asked(self, member: Member, samples: int) -> None:
        """So many samples more are awaited of an engine; fewer, if negative."""
        before = member.meter.queue
        member.meter.asked(samples)
        self._busy.change(bool(member.meter.queue) - bool(before))

    def lose(self, member: Member, life: int, what: str | EngineLostError) -> EngineLostError:
        """Take an engine out, unless another request has noticed before."""
        if member.life != life or not (member.ready or member.waiting):
            return EngineLostError(f"{member.name} is lost")
        known = member.ready
        error = what if isinstance(what, EngineLostError) else EngineLostError(member.server.failure(what))
        member.ready, member.waiting, member.error = False, False, error
        member.failures += 1
        self.lost += 1
        _say(f"{member.name} is taken out", error)
        if self.watcher and known:
            self.watcher.left(member)
        self._spawn(self._bring_back(member))
        return error

    async def _bring_back(self, member: Member) -> None:
        """Start it again, or wait for it, as often as `max_restarts` allows."""
        while member.failures <= self.section.max_restarts or (member.remote and any(m.ready for m in self.members)):
            try:
                await asyncio.to_thread(member.restart)
                while member.version != self.weights.version and not self.weights.passed:
                    with self._counted_as_loading():
                        await asyncio.to_thread(member.load, self.weights, late=True)
            except (EngineError, OSError) as error:
                member.error = error if isinstance(error, EngineError) else member.server.failure(f"failed ({error})")
                member.failures += 1
                _say(f"{member.name} does not come back", member.error)
                continue
            member.life += 1
            self.returned += 1
            if member.version != self.weights.version:
                member.waiting = True
                logger.warning("%s is back, and waits for the next weights", member.name)
                break
            member.ready = True
            logger.warning("%s is back, with weights %d", member.name, member.version)
            if self.watcher:
                self.watcher.joined(member)
            break
        else:
            member.gone = True
            await asyncio.to_thread(member.server.close)
            logger.warning("%s is given up after %d restarts", member.name, self.section.max_restarts)
        async with self._changed:
            self._changed.notify_all()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)  # a loop alone would let it be collected
        task.add_done_callback(self._tasks.discard)

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.aclose()


@dataclass(frozen=True)
class _Meanwhile:
    """See `responses.Meanwhile`."""

    engines: Engines
    member: Member
    first: int
    """Version of the engine's weights when it was asked."""

    def versions(self) -> tuple[int, int]:
        return self.first, self.engines.weights.version

    def awake(self) -> float:
        return self.member.awake

    def cut(self) -> bool:
        return self.member.cut


def _say(what: str, error: EngineError) -> None:
    logger.warning("%s: %s", what, str(error).splitlines()[0])
