"""Dispatch by shares: each engine gets one contiguous part of a batch in one request, and its samples repeat bitwise.

An engine that is lost is waited for, and is sent its whole part again: what shares a step with what stays the same.
"""

import asyncio

from megatron_r1.errors import EngineError
from megatron_r1.rollout.engines import Engines, Work
from megatron_r1.rollout.member import Member
from megatron_r1.rollout.responses import Ask, Response
from megatron_r1.rollout.server import EngineLostError, WeightsNeededError


class Shares:
    """As many parts as there are engines, ready or not.

    Args:
        engines: the fleet.
    """

    def __init__(self, engines: Engines) -> None:
        self.engines = engines

    async def run(self, work: Work) -> None:
        """Have all of it answered.

        Raises:
            EngineError: an engine is given up, or refuses; `WeightsNeededError`: one waits for a push.
        """
        members = self.engines.members
        share = -(-len(work.prompts) // len(members))
        parts = [range(start, min(start + share, len(work.prompts))) for start in range(0, len(work.prompts), share)]
        try:
            async with asyncio.TaskGroup() as group:
                for part, member in zip(parts, members, strict=False):
                    group.create_task(self._answer(work, part, member))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _answer(self, work: Work, part: range, member: Member) -> None:
        chosen = slice(part.start, part.stop)
        questions = work.questions and work.questions[chosen]
        request = Ask(work.prompts[chosen], work.seeds[chosen], work.max_tokens[chosen], work.sampling, True, questions)
        there: list[dict[int, Response]] = [{} for _ in part]

        def take(response: Response) -> None:
            group = there[response.prompt]
            if response.sample in group:  # sent again, the same bits
                return
            group[response.sample] = response
            if len(group) == len(request.seeds[response.prompt]):
                work.arrived.put((part[response.prompt], [group[sample] for sample in sorted(group)]))

        while True:
            await self.engines.until(lambda: member.ready or member.gone or member.waiting)
            if member.waiting:
                raise WeightsNeededError(f"{member.name} has come back without weights")
            if member.gone:
                raise member.error or EngineError(f"{member.name} is gone")
            try:
                await self.engines.ask(member, request, take)
                return
            except EngineLostError:
                self.engines.samples_again += sum(map(len, request.seeds))
