"""Multiple choice: a question, its options, and the letter of the right one."""

import random
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any, ClassVar, Literal

from megatron_r1.config.records import RecordsSection
from megatron_r1.config.section import Component
from megatron_r1.data.records import Row
from megatron_r1.data.tasks.base import Problem
from megatron_r1.data.tasks.records import RecordsTask
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.seeds import stream_seed


class Stem(RecordsTask):
    """Questions of science with 2 to 26 options; the prompt lists them from A on.

    `choices` is a list of texts, `{"A": text, ...}`, or `{"label": [...], "text": [...]}`. `answer` is the letter or
    label of an option, its number from 0, or its text.
    """

    class Config(RecordsSection):
        answer_is: Literal["label", "number", "text"] | None = None
        """What `answer` holds; None = told from the row: a number, else a label, else a text."""
        distractors: list[str] = []
        """Columns of wrong options, where there is no column `choices`; `answer` then holds the text of the right
        one, and options are always shuffled."""
        shuffle_choices: bool = False
        """Put the options into an order drawn from their own texts, the same in training and in evaluation."""

    required: ClassVar[tuple[str, ...]] = ("question", "answer")
    optional: ClassVar[tuple[str, ...]] = ("choices",)
    default_rewards: ClassVar[dict[str, Component]] = {
        "multiple_choice": {"type": "multiple_choice"},
        "format": {"type": "format"},
    }

    def __init__(self, config: Config) -> None:
        """Raises ConfigError for keys that exclude one another."""
        super().__init__(config)
        if config.distractors and (config.answer_is or "text") != "text":
            raise ConfigError(f"stem: with `distractors` the answer is a text, not a {config.answer_is}")

    def parse(self, row: Row) -> Problem:
        question = row.text("question").strip()
        choices, right = self._options(row)
        if self.config.shuffle_choices or self.config.distractors:
            order = list(range(len(choices)))
            random.Random(stream_seed("choices", question, *sorted(choices))).shuffle(order)
            choices, right = [choices[place] for place in order], order.index(right)
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False))
        return Problem(f"{question}\n\n{listed}", ascii_uppercase[right], {"choices": choices})

    def _options(self, row: Row) -> tuple[list[str], int]:
        """The options in the order of the data, and the place of the right one."""
        if self.config.distractors:
            wrong = [row.values.get(column) for column in self.config.distractors]
            return _texts(row, [row.get("answer"), *wrong]), 0
        labels, texts = _labelled(row)
        return texts, _right(row, self.config.answer_is, labels, texts)


def _labelled(row: Row) -> tuple[list[str], list[str]]:
    """Labels and texts of the options."""
    choices = row.get("choices")
    if isinstance(choices, dict) and set(choices) >= {"label", "text"}:
        labels, texts = [str(label) for label in choices["label"]], _texts(row, choices["text"])
    elif isinstance(choices, dict):
        given = {label: text for label, text in sorted(choices.items()) if text is not None}  # Arrow fills in None
        labels, texts = list(given), _texts(row, list(given.values()))
    elif isinstance(choices, list):
        labels, texts = list(ascii_uppercase[: len(choices)]), _texts(row, choices)
    else:
        raise DataError(f"{row.place}: `choices` holds {choices!r}; a list or a table of options was expected")
    if len(labels) != len(texts) or len(set(labels)) != len(labels):
        raise DataError(f"{row.place}: {len(texts)} options with the labels {labels}")
    return labels, texts


def _texts(row: Row, choices: Sequence[Any]) -> list[str]:
    texts = [str(choice).strip() for choice in choices if choice is not None]
    if len(texts) != len(choices) or not all(texts) or len(set(texts)) != len(texts):
        raise DataError(f"{row.place}: options are empty or the same: {choices!r}")
    if not 2 <= len(texts) <= len(ascii_uppercase):
        raise DataError(f"{row.place}: {len(texts)} options; 2 to {len(ascii_uppercase)} can be listed")
    return texts


def _right(row: Row, kind: str | None, labels: list[str], texts: list[str]) -> int:
    """The place of the right option."""
    answer = row.get("answer")
    text = str(answer).strip()
    label = text if text in labels else text.strip("(). ")  # "(B)" and "B." are common
    number = int(text) if text.isdecimal() and not isinstance(answer, bool) else len(texts)
    if kind is None:
        kind = "number" if isinstance(answer, int) else "label" if label in labels else "text"
    if kind == "label" and label in labels:
        return labels.index(label)
    if kind == "number" and number < len(texts):
        return number
    if kind == "text" and text in texts:
        return texts.index(text)
    options = dict(zip(labels, texts, strict=True))
    raise DataError(f"{row.place}: answer {answer!r} is no {kind} of an option; the options are {options}")
