"""One look after an engine for all that read from it."""

import asyncio
from collections.abc import Callable

import httpx
import psutil
import pytest

from megatron_r1.rollout.member import Health
from tests.rollout.test_engine_faults import PROMPTS, Open, expected, opened, tokens, wait_for  # noqa: F401

READERS = 5


class Engine:
    """Is there for so many looks; then it is lost, or looking fails otherwise."""

    def __init__(self, looks: int, then: Callable[[], bool] = lambda: True) -> None:
        self.looks, self.then = looks, then
        self.asked = 0

    def lost(self) -> bool:
        self.asked += 1
        return self.asked > self.looks and self.then()


def refuse() -> bool:
    raise RuntimeError("the client has been closed")


async def never() -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("then", [lambda: True, refuse], ids=["lost", "fails"])
def test_all_readers_hear_that_an_engine_is_lost(then: Callable[[], bool]) -> None:
    engine = Engine(2, then)

    async def read() -> list[BaseException | None]:
        health = Health(engine.lost, seconds=0.001)
        return await asyncio.gather(*(health.while_there(never()) for _ in range(READERS)), return_exceptions=True)

    assert [type(outcome) for outcome in asyncio.run(read())] == [httpx.ConnectError] * READERS
    assert engine.asked == 3


def test_a_reader_that_has_read_all_is_not_asked_for() -> None:
    """Nobody looks once the last has ended; who comes at that moment has a look of his own."""
    engine = Engine(10**9)
    read: list[int] = []

    async def reading(number: int) -> None:
        before = engine.asked
        while engine.asked == before:
            await asyncio.sleep(0.001)
        read.append(number)

    async def run() -> None:
        health = Health(engine.lost, seconds=0.001)
        async with asyncio.timeout(60):
            for _ in range(20):
                await asyncio.gather(*(health.while_there(reading(number)) for number in range(READERS)))
            for _ in range(100):
                await health.while_there(asyncio.sleep(0))
            while len(asyncio.all_tasks()) > 1:
                await asyncio.sleep(0.001)

    asyncio.run(run())
    assert sorted(read) == sorted([*range(READERS)] * 20)


def test_what_reading_raises_is_raised() -> None:
    async def fail() -> None:
        raise httpx.ReadTimeout("nothing for 5 s")

    with pytest.raises(httpx.ReadTimeout):
        asyncio.run(Health(Engine(0).lost).while_there(fail()))


@pytest.mark.parametrize("dispatch", ["batch", "continuous"])
def test_an_engine_without_its_supervisor_is_replaced(opened: Open, dispatch: str) -> None:  # noqa: F811
    """It would answer for ever, and outlive a run that is killed."""
    fleet = opened(dispatch=dispatch)
    server = fleet.process(0)
    supervisor = server.parent()
    assert supervisor is not None
    supervisor.kill()
    wait_for(lambda: supervisor.status() == psutil.STATUS_ZOMBIE)
    assert server.status() != psutil.STATUS_ZOMBIE
    assert tokens(fleet.sample(PROMPTS, n=2, seed=3)) == expected(2, 3, 0)
    wait_for(lambda: fleet.figures()["engines_ready"] == 2)
    assert fleet.figures()["engines_lost"] == 1
    assert server.status() == psutil.STATUS_ZOMBIE or not server.is_running()
