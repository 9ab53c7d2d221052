"""Responses taken apart and laid out anew: as rows are stored, and as a model is asked to rewrite them."""

import re

from megatron_r1.data.tasks import math
from megatron_r1.errors import ConfigError
from megatron_r1.reward.response import extract_answer, split_reasoning
from megatron_r1.types import Question

_OPEN = "<think>"
_ANSWER_TAG = re.compile(r"</?answer>")

PARTS = ("question", "reasoning", "summary", "answer", "reference", "response")
"""Placeholders of a layout."""


def parts(question: Question, response: str) -> dict[str, str]:
    """What can be named in a layout; a part that the response does not have is empty.

    Args:
        question: `metadata["text"]` is its bare text.
        response: all of it, `<think>` included.
    """
    reasoning, after = split_reasoning(response)
    rest = response if reasoning is None else after or ""
    summary = _ANSWER_TAG.sub("", rest).strip()
    final = extract_answer(response, "tags") or summary
    return {
        "question": str(question.metadata["text"]),
        "reasoning": (reasoning or "").strip(),
        "summary": summary,
        "answer": math.final_answer(final) or final,
        "reference": question.answer,
        "response": response,
    }


def fill(layout: str, values: dict[str, str]) -> str:
    """`layout` with `{name}` replaced for every name in `values`; other braces stay, for texts hold TeX and JSON."""
    return _placeholder(values).sub(lambda found: values[found[1]], layout)


def lacking(layout: str, values: dict[str, str]) -> list[str]:
    """Placeholders of `layout` that `values` have nothing for."""
    return [name for name in dict.fromkeys(_placeholder(values).findall(layout)) if not values[name]]


def check(layout: str, where: str, *more: str) -> None:
    """Raise ConfigError unless `layout` has a placeholder, of `PARTS` or `more`."""
    known = (*more, *PARTS)
    if not _placeholder(dict.fromkeys(known, "")).search(layout):
        names = ", ".join(f"{{{name}}}" for name in known)
        raise ConfigError(f"{where} has no placeholder, so every response would be the same; there are {names}")


def continuation(prompt: str, response: str) -> str:
    """`response` as it goes on from `prompt`, which may have opened the reasoning already.

    Behind such a prompt a response without reasoning closes it at once, as DeepSeek's chat template has it.
    """
    bare = prompt.rstrip()
    if not bare.endswith(_OPEN):
        return response
    _, opened, rest = response.partition(_OPEN)
    if not opened:
        return f"\n</think>\n\n{response}"
    return rest.removeprefix(prompt[len(bare) :])


def _placeholder(values: dict[str, str]) -> re.Pattern[str]:
    return re.compile(r"\{(" + "|".join(values) + r")\}")
