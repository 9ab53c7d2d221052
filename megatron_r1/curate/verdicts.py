"""A judge's verdicts, each written down as it arrives, so that none is asked for twice."""

import json
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from megatron_r1.config.chat_endpoint import ChatEndpointSection
from megatron_r1.errors import DataError
from megatron_r1.report.journal import read, replace_text
from megatron_r1.reward.chat_endpoint import ChatEndpoint, Verdict
from megatron_r1.reward.prompt import Messages
from megatron_r1.rollout.answers import digest

V = TypeVar("V", bound=Verdict)
VERDICTS = "verdicts.jsonl"
AHEAD = 2
"""Questions that wait for the judge, for each one that it may answer at once."""
_ANSWERED_BY = {"model", "temperature", "max_tokens", "json_schema", "extra"}
"""Keys of [judge] that verdicts depend on; the address is not one, for a judge may move."""


@dataclass(frozen=True)
class Query:
    """One question to the judge."""

    messages: Messages
    seed: int


class Verdicts(Generic[V]):
    """Asks a judge, many questions at a time; a context manager.

    Args:
        section: the judge.
        form: what it answers.
        output: folder of `verdicts.jsonl`: verdicts that stand there are read back.

    Raises:
        DataError: a `verdicts.jsonl` that is not ours.
    """

    def __init__(self, section: ChatEndpointSection, form: type[V], output: Path) -> None:
        self.endpoint = ChatEndpoint(section)
        self._form = form
        self._settings = section.model_dump(mode="json", include=_ANSWERED_BY)
        path = output / VERDICTS
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = read(path)
        try:
            self._known: dict[str, dict[str, Any]] = {row["key"]: row["verdict"] for row in rows}
        except (LookupError, TypeError) as error:
            raise DataError(f"{path} holds lines that are no verdicts; move it away to ask anew") from error
        replace_text(path, "".join(map(_line, rows)))  # without the line that a kill cut short
        self._file = path.open("a", encoding="utf-8", errors="replace")
        self._prepared = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def on(self, items: Iterable[list[Query]]) -> Iterator[list[V | None]]:
        """The verdicts on each item, in the order of its queries; None where the judge failed.

        Raises:
            ConfigError: the endpoint does not accept what it is sent.
            EngineError: it is not there, or fails again and again.
        """
        waiting: deque[list[str]] = deque()
        pending: dict[Future[V | None], str] = {}
        answered: dict[str, V | None] = {}

        def complete(most: int) -> Iterator[list[V | None]]:
            """The items that are done, in order, once at most this many answers are awaited."""
            while True:
                while waiting and all(key in answered for key in waiting[0]):
                    yield [answered.pop(key) for key in waiting.popleft()]
                if len(pending) <= most:
                    return
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    key = pending.pop(future)
                    answered[key] = self._keep(key, future.result())

        for queries in items:
            waiting.append([self._begin(query, pending, answered) for query in queries])
            yield from complete(AHEAD * self.endpoint.section.max_concurrency)
        yield from complete(0)

    def _begin(self, query: Query, pending: dict["Future[V | None]", str], answered: dict[str, V | None]) -> str:
        """Ask, unless the verdict is known; its key."""
        key = digest(self._settings, self._form.__name__, query.messages, query.seed)
        if key in self._known:
            answered[key] = self._form.model_validate(self._known[key])
            return key
        if not self._prepared:
            self.endpoint.prepare()
            self._prepared = True
        pending[self.endpoint.ask(query.messages, self._form, query.seed)] = key
        return key

    def _keep(self, key: str, verdict: V | None) -> V | None:
        """Write it down; a failure is not, so that another run asks again."""
        if verdict is not None:
            self._file.write(_line({"key": key, "verdict": verdict.model_dump()}))
            self._file.flush()
        return verdict


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
