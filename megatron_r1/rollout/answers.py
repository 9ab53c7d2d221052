"""Judged answers on disk: one line a batch of questions, found again by all that they depend on."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_r1.data.tasks import math
from megatron_r1.errors import DataError
from megatron_r1.reward.response import extract_answer, response
from megatron_r1.types import Group

_BEGINNING = re.compile(rb'\{"key": "(\w+)", "answers": \[')


@dataclass(frozen=True)
class Answer:
    """One judged response."""

    text: str
    tokens: int
    """Length of the response, without what tools replied."""
    finished: bool
    """False when it was cut at the length limit."""
    correct: bool | None
    """None where no reward of the question judges that."""
    rewards: dict[str, float | None]
    final: str | None
    """The final answer as it counts in a vote; None where the response has none."""


class AnswerFile:
    """An append-only JSONL file of batches of answers; a context manager.

    A batch is one line, so a kill leaves a batch whole or out; the broken last line that it may leave is cut off on
    opening. Only where each batch stands is held in memory.

    Raises:
        DataError: a whole line that is not one of ours.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self._starts: dict[str, int] = {}
        self._file = path.open("r+b")
        start = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            self._starts[self._key(line, number)] = start
            start += len(line)
        self._file.truncate(start)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self._starts

    def read(self, key: str) -> list[list[Answer]]:
        """The answers to each question of a batch."""
        self._file.seek(self._starts[key])
        batch = json.loads(self._file.readline())["answers"]
        return [[Answer(**answer) for answer in answers] for answers in batch]

    def append(self, key: str, batch: Sequence[Sequence[Answer]]) -> None:
        """Write one batch and hand it to the operating system at once."""
        row = {"key": key, "answers": [[asdict(answer) for answer in answers] for answers in batch]}
        line = json.dumps(row, ensure_ascii=False).encode(errors="replace") + b"\n"
        self._starts[key] = self._file.seek(0, 2)
        self._file.write(line)
        self._file.flush()

    def _key(self, line: bytes, number: int) -> str:
        found = _BEGINNING.match(line)  # without parsing the rest: of a large data set that takes hours
        if found is None or not line.endswith(b"]}\n"):
            raise DataError(f"{self.path}, line {number} holds no answers; remove that line (they are sampled again)")
        return found[1].decode()


def to_answers(group: Group) -> list[Answer]:
    """What is kept of judged samples."""
    return [
        Answer(
            text=sample.text,
            tokens=sample.length,
            finished=sample.finished,
            correct=sample.correct,
            rewards=sample.rewards,
            final=final_answer(response(group.question, sample)),
        )
        for sample in group.samples
    ]


def final_answer(text: str) -> str | None:
    r"""The answer of a response in the form in which equal answers are equal texts.

    It is the one `<answer>` block, else what follows the reasoning; of that the last `\boxed{...}` (or what follows
    `####`), if there is one. Unicode NFKC, case folded, without white space, `$` and a full stop at the end.
    """
    found = extract_answer(text, "tags")
    if found is None:
        found = extract_answer(text, "after_think") or ""
    plain = unicodedata.normalize("NFKC", math.final_answer(found) or found).casefold()
    return re.sub(r"[\s$]|\.$", "", plain.strip()) or None


def digest(*parts: Any) -> str:
    """A key for all that answers depend on; `parts` are JSON-able."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
