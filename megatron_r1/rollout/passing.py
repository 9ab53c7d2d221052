"""New weights for all engines together that no file holds, and the memory that they give back between two of these."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from typing import Any

from megatron_r1.errors import EngineError
from megatron_r1.rollout.engines import DRAIN_SECONDS, Engines
from megatron_r1.rollout.fan_out import TransferError
from megatron_r1.rollout.member import Member, Weights
from megatron_r1.rollout.server import EngineLostError


async def pass_weights(engines: Engines, send: Callable[[list[Member]], None], version: int) -> None:
    """Give engines new weights; those that come back later get the next ones. On the engines' loop.

    At group borders all wait until each has done what it was asked for, and get nothing new until then.

    Args:
        engines: the fleet.
        send: sends the weights, and lets the engines go on.
        version: of the weights.

    Raises:
        TransferError: they have not arrived everywhere. The engines that are not lost by it are held.
        EngineError: all engines are given up.
    """
    await wake(engines)
    engines.look_again()
    members = engines.members
    await engines.until(lambda: any(_there(one) for one in members) or all(one.gone for one in members))
    taking = [member for member in members if _there(member)]
    if not taking:
        raise members[-1].error or EngineError("all engines are gone")
    for member in taking:
        if engines.watcher and member.ready:
            engines.watcher.held(member)
    await _unburden(engines, taking)
    engines.weights = Weights(version, passed=True)
    taking = [member for member in taking if _there(member)]
    try:
        with ExitStack() as loading:
            for member in taking:
                loading.enter_context(member.asleep())
            await asyncio.to_thread(send, taking)
    except TransferError as error:
        for member in taking:
            if isinstance(lost := error.engines.get(member.name), EngineLostError):
                engines.lose(member, member.life, lost)
        raise
    for member in filter(_there, taking):
        member.version, member.ready, member.waiting = version, True, False
        if engines.watcher:
            engines.watcher.joined(member)


async def sleep(engines: Engines) -> None:
    """Have engines give their GPUs' memory back, until they get new weights. On their loop."""
    engines.asleep = True
    await _tell(engines, lambda member: member.client.sleep())


async def wake(engines: Engines) -> None:
    """Have them take it again, if they sleep."""
    if engines.asleep:
        engines.asleep = False
        await _tell(engines, lambda member: member.client.wake())


async def _unburden(engines: Engines, members: list[Member]) -> None:
    """Wait for what engines were asked, or have them give it back, as the run file says."""
    if engines.weights_change == "at_group_borders":
        while any(member.meter.queue for member in members if member.ready):
            await asyncio.sleep(DRAIN_SECONDS)
    elif engines.weights_change == "partial_rollouts":
        await asyncio.gather(*(_do(engines, member, engines.cut(member)) for member in members if member.ready))


async def _tell(engines: Engines, what: Callable[[Member], None]) -> None:
    ready = [member for member in engines.members if member.ready]
    await asyncio.gather(*(_do(engines, member, asyncio.to_thread(what, member)) for member in ready))


async def _do(engines: Engines, member: Member, what: Coroutine[Any, Any, None]) -> None:
    life = member.life
    try:
        await what
    except EngineLostError as error:
        engines.lose(member, life, error)


def _there(member: Member) -> bool:
    return member.ready or member.waiting
