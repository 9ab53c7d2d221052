"""How a response is laid out: `<think>` reasoning `</think>`, then `<answer>` answer `</answer>` or free text."""

import re
from typing import Literal

from megatron_r1.types import Question, Sample

Layout = Literal["tags", "after_think"]
"""What follows the reasoning: `tags` = one `<answer>` block (R1-Zero), `after_think` = free text (DeepSeek-R1 and the
models distilled from it)."""
AnswerIn = Literal["tags", "after_think", "anywhere"]
"""Where the answer is looked for: by the layout, or `anywhere` = as `after_think`, and in all of a response that does
not reason in tags. That is for evaluating models that were not trained to."""
Part = Literal["summary", "response"]
"""What a reward model or a judge of preferences reads: `summary` = what follows the reasoning, `response` = all.
DeepSeek-R1's helpful reward model scores the final summary only, its safety one the whole response."""

_TAG = re.compile(r"(</?(?:think|answer)>)")
_OPEN = "<think>"


def segments(text: str) -> list[str]:
    """`text` cut at its tags: text, tag, text, tag, ... text (odd length, texts may be empty)."""
    return _TAG.split(text)


def response(question: Question, sample: Sample) -> str:
    """The sample's text, with the `<think>` that a template already put at the end of the prompt.

    Where tools were called outside the reasoning, it is what follows the last reply.
    """
    return message(question, sample.text, sample.answer_from)


def message(question: Question, text: str, start: int) -> str:
    """The message that begins at character `start` of a sample's text."""
    opened = start == 0 and question.prompt.rstrip().endswith(_OPEN)
    return _OPEN + text if opened else text[start:]


def next_message(question: Question, text: str, start: int) -> int:
    """Where the message that holds the answer begins once a tool has replied, at the end of `text`.

    Reasoning that is under way goes on behind the reply. Otherwise another message begins there, with the `<think>`
    that the reply may end with.
    """
    whole = message(question, text, start)
    if whole.rfind(_OPEN) > whole.rfind("</think>") and not whole.rstrip().endswith(_OPEN):
        return start
    return text.rindex(_OPEN) if text.rstrip().endswith(_OPEN) else len(text)


def split_reasoning(text: str) -> tuple[str | None, str | None]:
    """Reasoning and what follows it: `(None, None)` without `<think>`, `(reasoning, None)` where it never closes.

    The reasoning ends at the first `</think>`, so nothing behind it can be counted twice.
    """
    _, opened, rest = text.partition(_OPEN)
    if not opened:
        return None, None
    reasoning, closed, after = rest.partition("</think>")
    return reasoning, after if closed else None


def scored_part(text: str, part: Part) -> str:
    """The part of a response that a reward model scores, without white space around it; training and serving alike.

    A response without reasoning is its own summary; one whose reasoning never closes has none, so "" is returned.
    `text` holds the `<think>` that a template may have put at the end of the prompt (see `response`), or the
    `</think>` alone.
    """
    if part == "response":
        return text.strip()
    _, closed, after = text.partition("</think>")
    if closed:
        return after.strip()
    return "" if _OPEN in text else text.strip()


def extract_answer(text: str, where: AnswerIn = "tags") -> str | None:
    """The final answer, or None where the response has none or more than one.

    It is never looked for inside the reasoning, and a response that thinks again after it has none.
    """
    reasoning, after = split_reasoning(text)
    if where == "anywhere" and reasoning is None:
        after = text
    if after is None:
        return None
    parts = segments(after)
    if where != "tags":
        return None if {"<think>", "</think>"} & set(parts[1::2]) else after.strip() or None
    return parts[2].strip() if parts[1::2] == ["<answer>", "</answer>"] else None
