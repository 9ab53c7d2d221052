"""Responses of several turns: the model calls a tool, reads the reply and goes on, on the engine that it began on.

    prompt -> turn (sampled) -> reply (mask False) -> turn (sampled) -> ... -> end of sequence

What the model has said is never tokenised again: the next turn's prompt is the token ids so far, and the reply's.

A turn stops at the token that the `end` of a call ends with, which the engine's scheduler sees. A stop text would be
seen outside, some steps later, and what shares a step would then be a matter of time. Such a token may stand elsewhere,
too: a turn that has stopped at no call goes on as if it had not.

Turn k draws from a stream of its own, derived from the sample's seed. Where turns go together (`Ask.together`) all
samples that go on take their next turn in one request, so responses repeat bit for bit if the tools' outputs do.
"""

import asyncio
import re
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from megatron_r1.config import component
from megatron_r1.config.conversation import ConversationSection
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError, UserError
from megatron_r1.reward.response import next_message
from megatron_r1.rollout.engine import Sampling
from megatron_r1.rollout.responses import Ask, Response
from megatron_r1.rollout.tools.base import Tool
from megatron_r1.seeds import stream_seed
from megatron_r1.types import Question

Take = Callable[[Response], None]
AskOnce = Callable[[Ask, Take], Awaitable[None]]
"""Has an engine answer a request; each response goes to the second argument."""

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_CUT = "\n... (cut)"


class Conversation:
    """Holds the conversations of a fleet, on its loop.

    Args:
        section: the run file's [conversation].
        tokenizer: of the model.

    Raises:
        ConfigError: a tool that is none, or whose `end` the tokenizer does not give back.
    """

    def __init__(self, section: ConversationSection, tokenizer: Tokenizer) -> None:
        self._section, self._tokenizer = section, tokenizer
        self._tools = {name: _build(name, part, tokenizer) for name, part in section.tools.items()}
        configs = [tool.config for tool in self._tools.values()]
        stops = [tokenizer.beginning_as_the_end_of(config.end) for config in configs if config.end]
        self._stops = tuple(sorted({token for end in stops for token in end}))
        marks = {*_TAGS, *tokenizer.added, *(mark for config in configs for mark in (config.begin, config.end))}
        longest_first = sorted((mark for mark in marks if len(mark.strip()) > 1), key=len, reverse=True)
        self._marks = re.compile("|".join(map(re.escape, longest_first)))
        self._slots = asyncio.Semaphore(section.concurrency)
        self.counters: Counter[str] = Counter(tool_errors=0, tool_timeouts=0)
        """Calls that raised an error, or took too long."""

    def prepare(self) -> None:
        """Start the tools.

        Raises:
            UserError: what one of them needs is missing.
        """
        for tool in self._tools.values():
            tool.prepare()

    def close(self) -> None:
        """End the tools; may be called more than once."""
        for tool in self._tools.values():
            tool.close()

    async def hold(self, ask: AskOnce, request: Ask, take: Take) -> None:
        """Have a request answered turn by turn; each whole response goes to `take`.

        Raises:
            UserError: of an engine or a tool that does not work.
        """
        talks = [
            _Talk(prompt, sample, request, self._tokenizer.decode)
            for prompt, seeds in enumerate(request.seeds)
            for sample in range(len(seeds))
        ]
        turn = replace(request, sampling=self._stopping(request.sampling))
        places = {(talk.number, talk.sample): talk for talk in talks}
        while places:
            going_on = await self._turn(ask, turn, places, take)
            turn = self._next_turn(request, going_on)
            places = {(place, 0): talk for place, talk in enumerate(going_on)}

    async def _turn(
        self, ask: AskOnce, request: Ask, places: "dict[tuple[int, int], _Talk]", take: Take
    ) -> "list[_Talk]":
        """One request; returns who takes another turn, in order. `places`: (prompt, sample) -> whose turn it is."""
        after: dict[_Talk, asyncio.Task[bool]] = {}
        try:
            async with asyncio.TaskGroup() as group:

                def arrived(response: Response) -> None:
                    talk = places[response.prompt, response.sample]
                    talk.hear(response)
                    rest = self._goes_on(talk, take) if request.together else self._alone(ask, talk, take)
                    after[talk] = group.create_task(rest)

                await ask(request, arrived)
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [talk for talk in places.values() if after[talk].result()]

    async def _alone(self, ask: AskOnce, talk: "_Talk", take: Take) -> bool:
        """All turns after the first, whatever others do; nothing is left to do then."""
        while await self._goes_on(talk, take):
            await ask(self._next_turn(talk.request, [talk]), talk.hear)
        return False

    async def _goes_on(self, talk: "_Talk", take: Take) -> bool:
        """After a turn: whether there is another one. If not, the response is given away."""
        ended = not talk.cut and talk.tokens[-1] in talk.request.sampling.stop_token_ids
        found = None if talk.cut else self._call(talk, ended)
        if found is None and (ended or not talk.left):
            take(talk.response(finished=ended))
            return False
        if found is None:  # stopped at no call
            return True
        if talk.turns < self._section.max_turns:
            reply = self._tokenizer.encode(await self._reply(*found, talk.question))
            if len(reply) < talk.left:
                talk.read(reply)
                return True
        take(talk.response(finished=False))
        return False

    def _call(self, talk: "_Talk", ended: bool) -> tuple[Tool, str] | None:
        """The tool that is called, and what with."""
        names = self._tools if talk.question.tools is None else talk.question.tools
        for name in names:
            if (call := self._tools[name].find(talk.said, ended, talk.question)) is not None:
                return self._tools[name], call
        return None

    async def _reply(self, tool: Tool, call: str, question: Question) -> str:
        """What is appended to a call."""
        output = self._marks.sub(lambda mark: f"{mark[0][0]} {mark[0][1:]}", await self._run(tool, call, question))
        ids = self._tokenizer.encode(output)
        if len(ids) > self._section.max_output_tokens:
            output = self._tokenizer.decode(ids[: self._section.max_output_tokens]) + _CUT
        return str(tool.config.result).replace("{output}", output)

    async def _run(self, tool: Tool, call: str, question: Question) -> str:
        """The tool's output, or what went wrong."""
        done: Future[str] = Future()
        done.set_running_or_notify_cancel()  # from here on nobody can cancel it

        def work() -> None:
            try:
                done.set_result(tool.run(call, question))
            except BaseException as error:  # whatever code of others does, sys.exit() included
                done.set_exception(error)

        async with self._slots:
            threading.Thread(target=work, name="tool", daemon=True).start()
            try:
                return await asyncio.wait_for(asyncio.wrap_future(done), self._section.timeout)
            except TimeoutError:
                self.counters["tool_timeouts"] += 1
                return f"error: no answer within {self._section.timeout:g} s"
            except (UserError, asyncio.CancelledError):
                raise
            except BaseException as error:
                self.counters["tool_errors"] += 1
                return f"error: {type(error).__name__}: {error}"

    def _stopping(self, sampling: Sampling) -> Sampling:
        return replace(sampling, stop_token_ids=tuple(dict.fromkeys((*sampling.stop_token_ids, *self._stops))))

    def _next_turn(self, request: Ask, talks: "Sequence[_Talk]") -> Ask:
        """One prompt and one sample for each."""
        return replace(
            request,
            prompts=[talk.prompt for talk in talks],
            seeds=[[talk.seed] for talk in talks],
            max_tokens=[talk.left for talk in talks],
            sampling=self._stopping(request.sampling),
        )


@dataclass(eq=False)
class _Talk:
    """A response that is not complete."""

    number: int
    """Of the prompt in the request."""
    sample: int
    request: Ask
    decode: Callable[[list[int]], str]
    tokens: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    """As `Sample.weight_spans`."""
    requests: int = 0
    """That were answered."""
    turns: int = 1
    """In which the model has spoken."""
    cut: bool = False
    """Has the last request reached the length limit?"""
    answer_from: int = 0
    _turn_from: int = 0
    """Tokens before this turn."""

    @property
    def question(self) -> Question:
        assert self.request.questions is not None
        return self.request.questions[self.number]

    @property
    def left(self) -> int:
        """Tokens that the response may still have."""
        return self.request.max_tokens[self.number] - len(self.tokens)

    @property
    def said(self) -> str:
        """Text of this turn."""
        return self.decode(self.tokens[self._turn_from :])

    @property
    def prompt(self) -> list[int]:
        """Of the next request."""
        return self.request.prompts[self.number] + self.tokens

    @property
    def seed(self) -> int:
        """Of the next request."""
        first = self.request.seeds[self.number][self.sample]
        return stream_seed("turn", first, self.requests) if self.requests else first

    def hear(self, response: Response) -> None:
        """What the model has said."""
        before = len(self.logprobs)
        ends = response.version_ends or [len(response.tokens)]
        for version, end in zip(response.weight_versions, ends, strict=True):
            if self.spans and self.spans[-1][0] == version:
                self.spans.pop()
            self.spans.append((version, before + end))
        self.tokens += response.tokens
        self.logprobs += response.logprobs
        self.mask += [True] * len(response.tokens)
        self.cut = response.finish_reason == "length"
        self.requests += 1

    def read(self, reply: Sequence[int]) -> None:
        """What a tool has said."""
        self.tokens += reply
        self.mask += [False] * len(reply)
        self.answer_from = next_message(self.question, self.decode(self.tokens), self.answer_from)
        self._turn_from = len(self.tokens)
        self.turns += 1

    def response(self, finished: bool) -> Response:
        """All turns as one."""
        versions, ends = zip(*self.spans, strict=True)
        return Response(
            prompt=self.number,
            sample=self.sample,
            tokens=self.tokens,
            logprobs=self.logprobs,
            finish_reason="stop" if finished else "length",
            weight_versions=list(versions),
            version_ends=list(ends),
            mask=[] if all(self.mask) else self.mask,
            answer_from=self.answer_from,
        )


def _build(name: str, section: component.ToolComponent, tokenizer: Tokenizer) -> Tool:
    tool = component.build("tool", section)
    if not isinstance(tool, Tool):
        raise ConfigError(f"conversation.tools.{name}: {section['type']} is not a subclass of {Tool.__module__}.Tool")
    for key in ("begin", "end"):
        text = getattr(tool.config, key)
        if tokenizer.decode(tokenizer.encode(text)) != text:
            raise ConfigError(
                f"conversation.tools.{name}.{key} = {text!r} is {tokenizer.decode(tokenizer.encode(text))!r} once the "
                "tokenizer has read it, so no call would ever be found: it must not hold a begin, end or padding token"
            )
    return tool
