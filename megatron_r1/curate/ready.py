"""Ready rows as candidates: prompts with responses, or conversations."""

from collections.abc import Iterator
from typing import Any

from megatron_r1.config.collect import RowsSource
from megatron_r1.curate import filters
from megatron_r1.curate.candidates import Candidate
from megatron_r1.data.records import Records, Row
from megatron_r1.data.templates import render
from megatron_r1.errors import DataError
from megatron_r1.types import Question

DOMAIN = "general"
"""Of a source that names none."""
_ROLES = {"system", "user", "assistant"}


def candidates(name: str, section: RowsSource) -> Iterator[Candidate]:
    """The rows of a source.

    Raises:
        DataError: a source that cannot be read, or a row without prompt and response.
        ConfigError: an unknown template.
    """
    rows = Records(section.data)
    conversations = section.data.columns.get("messages", "messages") in rows.names
    rows.require(*(["messages"] if conversations else ["prompt", "response"]))
    if conversations and section.rewrite is not None:
        raise DataError(f"{section.data.source} holds `messages`; [rewrite] needs rows of `prompt` and `response`")
    for number, row in enumerate(rows):
        yield _conversation(name, section, number, row) if conversations else _pair(name, section, number, row)


def _pair(name: str, section: RowsSource, number: int, row: Row) -> Candidate:
    text, response = row.text("prompt"), row.text("response")
    reasoning = row.get("reasoning")
    if isinstance(reasoning, str) and reasoning.strip():
        response = f"<think>\n{reasoning.strip()}\n</think>\n\n{response}"
    return _candidate(name, section, number, row, (text, response))


def _conversation(name: str, section: RowsSource, number: int, row: Row) -> Candidate:
    messages = row.get("messages")
    if not isinstance(messages, list) or not all(map(_is_turn, messages)) or _last_role(messages) != "assistant":
        raise DataError(
            f"{row.place}: `messages` has to be a list of {{role, content}} that ends with the assistant's, roles "
            f"being {', '.join(sorted(_ROLES))}; it is {str(messages)[:200]}"
        )
    asked = "\n".join(turn["content"] for turn in messages if turn["role"] == "user")
    return _candidate(name, section, number, row, (asked, messages[-1]["content"]), messages)


def _candidate(
    name: str,
    section: RowsSource,
    number: int,
    row: Row,
    pair: tuple[str, str],
    messages: list[dict[str, str]] | None = None,
) -> Candidate:
    text, response = pair
    prompt = render(section.prompt_template, text)
    answer, language = row.get("answer"), row.get("language")
    metadata: dict[str, Any] = {"text": text, "place": row.place}
    if isinstance(language, str):
        metadata["language"] = language
    question = Question(str(number), "rows", prompt, "" if answer is None else str(answer), metadata)
    origin = {"place": row.place, "filters": filters.active(section.filters) if section.filters else []}
    return Candidate(name, section.domain or DOMAIN, question, prompt, response, origin, messages)


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and turn.get("role") in _ROLES and isinstance(turn.get("content"), str)


def _last_role(messages: list[dict[str, str]]) -> str | None:
    return messages[-1]["role"] if messages else None
