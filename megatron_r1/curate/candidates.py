"""Responses on their way into a data set, and the ledger of what becomes of each."""

import json
from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from megatron_r1.data.files import aside
from megatron_r1.types import Question

DROPPED = "dropped.jsonl"


@dataclass(frozen=True)
class Candidate:
    """One response that may become a row."""

    source: str
    domain: str
    question: Question
    prompt: str
    """As the row stores it."""
    response: str
    """All that was sampled, an opening `<think>` included; once it is laid out, what the row stores."""
    provenance: dict[str, Any]
    messages: list[dict[str, str]] | None = None
    """A conversation, which stands in the row instead of prompt and response."""

    def row(self) -> dict[str, Any]:
        """As it stands in `chats.jsonl`."""
        chat = {"messages": self.messages} if self.messages else {"prompt": self.prompt, "response": self.response}
        return {
            **chat,
            "domain": self.domain,
            "source": self.source,
            "question_id": f"{self.source}/{self.question.id}",
            "question": self.question.metadata["text"],
            "answer": self.question.answer,
            "provenance": self.provenance,
        }

    def spoken(self) -> list[str]:
        """What a model is trained to say."""
        if self.messages is None:
            return [self.response]
        return [turn["content"] for turn in self.messages if turn["role"] == "assistant"]


@dataclass
class Counts:
    """What became of the responses of one source and domain: sampled = kept + all that is dropped."""

    sampled: int = 0
    """Rows that were read, where the source has ready ones."""
    correct: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """By reason."""
    kept: int = 0
    rewritten: int = 0
    """Of those kept."""
    tokens: int = 0
    """Of those kept: what is trained, end-of-sequence tokens included."""
    rounds: int = 0

    def add(self, other: "Counts") -> None:
        for name in ("sampled", "correct", "kept", "rewritten", "tokens", "rounds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.dropped.update(other.dropped)

    def figures(self) -> dict[str, Any]:
        """For `summary.json`; means are over what is kept."""
        return {
            "sampled": self.sampled,
            "correct": self.correct,
            "dropped": dict(sorted(self.dropped.items())),
            "kept": self.kept,
            "rewritten": self.rewritten,
            "mean_rounds": self.rounds / self.kept if self.kept else None,
            "mean_tokens": self.tokens / self.kept if self.kept else None,
        }


class Ledger:
    """Counts every candidate, and writes those that are dropped to `dropped.jsonl`.

    A context manager, whose file appears when it ends without an error.
    """

    def __init__(self, output: Path) -> None:
        self.counts: defaultdict[tuple[str, str], Counts] = defaultdict(Counts)
        """By source and domain."""
        self.questions: defaultdict[str, Counter[str]] = defaultdict(Counter)
        """Of each source that samples: `asked`, and `no_room`, whose prompts leave none for a response."""
        self._output = output
        self._stack = ExitStack()
        self._file: TextIO | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            partial = stack.enter_context(aside(self._output / DROPPED))
            self._file = stack.enter_context(partial.open("w", encoding="utf-8", errors="replace"))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def sampled(self, candidate: Candidate, correct: bool | None = None) -> None:
        """A response there is."""
        counts = self._of(candidate)
        counts.sampled += 1
        counts.correct += correct is True

    def drop(self, candidate: Candidate, reason: str, detail: Any = None) -> None:
        """A response that goes no further; `reason` is one of few, `detail` says what was seen."""
        self._of(candidate).dropped[reason] += 1
        assert self._file is not None, "a ledger writes inside its `with` block"
        row = {"reason": reason, "detail": detail, **candidate.row()}
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def keep(self, candidate: Candidate, tokens: int) -> None:
        """A response that becomes a row."""
        counts = self._of(candidate)
        counts.kept += 1
        counts.rewritten += "rewritten" in candidate.provenance
        counts.tokens += tokens
        counts.rounds += len(candidate.spoken())

    def _of(self, candidate: Candidate) -> Counts:
        return self.counts[candidate.source, candidate.domain]
