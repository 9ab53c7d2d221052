"""Tasks over a data set: a row of it becomes a problem."""

import re
from abc import abstractmethod
from typing import Any, ClassVar

from megatron_r1.config.records import RecordsSection
from megatron_r1.data.records import Records, Row
from megatron_r1.data.tasks.base import Problem
from megatron_r1.data.tasks.finite import FiniteTask

_LANGUAGE_CODE = re.compile("[a-z]{2}")


class RecordsTask(FiniteTask):
    """A data set as a task. A subclass names the fields it reads, and makes a problem of a row.

    Every problem carries in its metadata `place`, where its row stands; `language`, if a column of that name holds an
    ISO 639-1 code; and `difficulty`, by which a run reports its pass rates, from a column of that name or the one that
    `columns` maps it to: `columns = { difficulty = "level" }`.
    """

    class Config(RecordsSection):
        """Keys beside the source's; a subclass with keys derives from this."""

    required: ClassVar[tuple[str, ...]]
    """Fields that need a column; `columns` of the section maps them to the data's own names."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Fields that are read where there is a column."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.records = Records(config, fields=(*self.required, *self.optional, "language", "difficulty"))

    @abstractmethod
    def parse(self, row: Row) -> Problem:
        """The problem of a row.

        Raises:
            DataError: the row does not hold one; the message begins with `row.place`.
        """

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    @property
    def size(self) -> int:
        return len(self.records)

    def row(self, number: int) -> Problem:
        self.records.require(*self.required)
        row = self.records[number]
        problem = self.parse(row)
        problem.metadata["place"] = row.place
        language = row.get("language")
        if isinstance(language, str) and _LANGUAGE_CODE.fullmatch(language):
            problem.metadata.setdefault("language", language)
        if (difficulty := row.get("difficulty")) is not None:
            problem.metadata.setdefault("difficulty", str(difficulty))
        return problem
