"""Rows of prompts and responses -> token ids to train on, each row audited first.

A row holds `prompt` and `response` as full texts, or `messages`. A conversation becomes one example for each turn of
the assistant: the prompt is what the tokenizer's chat template makes of the messages before it, exactly as at
inference. So only the assistant is trained on, and a template that strips the reasoning from earlier turns, as
DeepSeek-R1's does, strips it here too, but never from the turn that is learned. Trained are the response and the
end-of-sequence token.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_r1.config.records import RecordsSection
from megatron_r1.config.sft import ChatsSection
from megatron_r1.data.chat_template import ChatTemplate, audit_tags, begins_every_turn
from megatron_r1.data.records import Records, Row
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError

FIELDS = ("prompt", "response", "messages", "domain")
TAGS = ("<think>", "</think>")
TOO_LONG = "longer than max_length"
_CHUNK = 512
_SHOWN = 5
"""Bad rows that an error describes."""


@dataclass(frozen=True)
class Example:
    """One response, ready to train on."""

    prompt: list[int]
    """Begin-of-sequence token included, where the tokenizer has one. [prompt]"""
    response: list[int]
    """End-of-sequence token included. [response]"""
    domain: str


@dataclass
class Audit:
    """What was wrong with the rows of a reading."""

    examples: int = 0
    """Read, the left out ones included."""
    problems: dict[str, int] = field(default_factory=dict)
    """Reason why an example was left out -> how many."""
    shown: list[str] = field(default_factory=list)
    """The first bad rows: where, and what is wrong."""
    seams: int = 0
    """Examples whose prompt and response make other tokens together than apart."""
    seam: str = ""
    """The first of them."""

    @property
    def bad(self) -> int:
        """Left out for another reason than their length."""
        return sum(count for reason, count in self.problems.items() if reason != TOO_LONG)

    def left_out(self, reason: str, place: str, detail: str = "") -> None:
        """Count an example that is not trained on."""
        self.problems[reason] = self.problems.get(reason, 0) + 1
        if reason != TOO_LONG and len(self.shown) < _SHOWN:
            self.shown.append(f"{place}: {reason}{detail and f' ({detail})'}")

    def warnings(self) -> list[str]:
        """What to tell the user, most important first."""
        dropped = [f"{count:,} of {self.examples:,} responses left out: {why}" for why, count in self.problems.items()]
        if not self.seams:
            return dropped
        seam = (
            f"{self.seams:,} of {self.examples:,} prompts and responses make other tokens together than apart, so the "
            f"model may meet them cut otherwise than it was trained: {self.seam}"
        )
        return [*dropped, seam]


@dataclass(frozen=True)
class _Turn:
    """One response with the text before it."""

    prompt: str
    response: str
    domain: str
    place: str
    templated: bool
    """The prompt holds its own begin-of-sequence token."""


class _BadRowError(Exception):
    """Why nothing should be learned from a row, and what was found in it."""


class Chats:
    """Reader of one tokenizer's examples.

    Args:
        tokenizer: of the model that is trained.
        max_length: tokens of a prompt with its response; a longer example is left out and counted.

    Raises:
        DataError: a think tag is a token of the vocabulary, but is not encoded as one.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        self.audit = Audit()
        audit_tags(tokenizer, TAGS)

    def read(self, source: ChatsSection) -> Iterator[Example]:
        """The examples of a source that are fit to train on, in order; the others are counted in `audit`.

        Raises:
            DataError: an unreadable or empty source, or columns that are not there.
        """
        config = RecordsSection(source=source.path, **source.model_dump(exclude={"path", "weight"}))
        rows = Records(config, FIELDS)
        if (source.columns.get("messages", "messages")) not in rows.names:
            rows.require("prompt", "response")
        turns = self._turns(rows, Path(source.path).stem)
        while chunk := list(islice(turns, _CHUNK)):
            yield from self._encode(chunk)

    def _turns(self, rows: Iterable[Row], domain: str) -> Iterator[_Turn]:
        for row in rows:
            named = row.get("domain")
            try:
                yield from self._of_row(row, named if isinstance(named, str) and named else domain)
            except _BadRowError as bad:
                self.audit.examples += 1
                self.audit.left_out(bad.args[0], row.place, *bad.args[1:])

    def _of_row(self, row: Row, domain: str) -> list[_Turn]:
        messages = row.get("messages")
        if messages is not None:
            return [_Turn(*texts, domain, row.place, templated=True) for texts in self._replies(messages)]
        for name in ("prompt", "response"):
            value = row.get(name)
            if not isinstance(value, str) or not value.strip():
                there = f"{name} = {value!r:.60}" if value is not None else f"its columns are {', '.join(row.values)}"
                raise _BadRowError(f"no text in {name!r}", there)
        return [_Turn(row.get("prompt"), row.get("response"), domain, row.place, templated=False)]

    @cached_property
    def _many_begins(self) -> bool:
        return begins_every_turn(self._tokenizer)

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self._tokenizer)

    def _replies(self, messages: Any) -> Iterator[tuple[str, str]]:
        """Prompt and response of each of the assistant's turns."""
        if not isinstance(messages, Sequence) or not all(_is_message(message) for message in messages):
            raise _BadRowError("`messages` is not a list of { role, content } with texts in them", f"{messages!r:.80}")
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns or turns[0] == 0:
            raise _BadRowError("the assistant answers nothing", f"roles {[message['role'] for message in messages]}")
        for turn in turns:
            try:
                prompt = self._template.prompt(messages[:turn])
            except DataError:
                raise
            except Exception as error:  # whatever the template raises about roles and their order
                raise _BadRowError("the chat template refuses it", str(error)) from error
            content = messages[turn]["content"]
            if not content.strip():
                raise _BadRowError("no text in 'response'", f"message {turn + 1}")
            if opened := _opened_by(prompt):  # The template has begun the reasoning: do not begin it twice.
                content = content.removeprefix(opened).removeprefix(TAGS[0])
            yield prompt, content

    def _encode(self, turns: Sequence[_Turn]) -> Iterator[Example]:
        encode = self._tokenizer.encode_batch
        prompts, responses = encode([turn.prompt for turn in turns]), encode([turn.response for turn in turns])
        together = encode([turn.prompt + turn.response for turn in turns])
        begin = [] if self._tokenizer.bos_id is None else [self._tokenizer.bos_id]
        for turn, prompt, response, both in zip(turns, prompts, responses, together, strict=True):
            self.audit.examples += 1
            if both != prompt + response:
                self.audit.seams += 1
                self.audit.seam = self.audit.seam or f"{turn.place}: {turn.prompt[-20:]!r} | {turn.response[:20]!r}"
            example = Example(prompt if turn.templated else begin + prompt, response, turn.domain)
            try:
                self._refuse_bad(turn, example)
            except _BadRowError as bad:
                self.audit.left_out(bad.args[0], turn.place, *bad.args[1:])
                continue
            if len(example.prompt) + len(response) + 1 > self._max_length:
                self.audit.left_out(TOO_LONG, turn.place)
                continue
            response.append(self._tokenizer.eos_id)
            yield example

    def _refuse_bad(self, turn: _Turn, example: Example) -> None:
        bos, eos = self._tokenizer.bos_id, self._tokenizer.eos_id
        if not _balanced(turn.prompt, turn.response):
            raise _BadRowError("<think> and </think> do not match", f"{turn.response!r:.80}")
        if eos in example.response:
            raise _BadRowError(
                "an end-of-sequence token inside the response", "leave it out: it is added to every response"
            )
        if bos is None:
            return
        if example.prompt[0] != bos:
            raise _BadRowError("the prompt begins without the begin-of-sequence token", f"{turn.prompt!r:.60}")
        if example.prompt[1:2] == [bos] or (bos in example.prompt[1:] and not self._many_begins):
            raise _BadRowError(
                "a second begin-of-sequence token in the prompt", "leave it out: it is added to every prompt"
            )
        if bos in example.response:
            raise _BadRowError("a begin-of-sequence token inside the response", f"{turn.response!r:.60}")


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _opened_by(prompt: str) -> str:
    """The `<think>` that ends a prompt, with the white space behind it; empty if none does."""
    found = re.search(r"<think>\s*$", prompt)
    return found.group() if found else ""


def _balanced(prompt: str, response: str) -> bool:
    """Whether every reasoning that the prompt's end or the response opens is closed before the next one opens."""
    is_open = bool(_opened_by(prompt))
    for tag in re.findall(r"</?think>", response):
        if is_open == (tag == TAGS[0]):
            return False
        is_open = not is_open
    return not is_open
