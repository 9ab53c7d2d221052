"""LiveCodeBench: programming contests with dates, so that a model is asked what was published after it was trained.

Data in the shape of `livecodebench/code_generation_lite` (Jain et al. 2024, arXiv 2403.07974).
"""

import base64
import io
import json
import pickle
import zlib
from functools import cached_property
from typing import Any, ClassVar

from megatron_r1.config.records import RecordsSection
from megatron_r1.data.records import Row
from megatron_r1.data.tasks.base import Problem
from megatron_r1.data.tasks.code import Code
from megatron_r1.data.tasks.code_tests import code_tests
from megatron_r1.errors import DataError


class LiveCodeBench(Code):
    """Its problems with their public and private tests. DeepSeek-R1 is evaluated on those of 2024-08 to 2025-01."""

    class Config(RecordsSection):
        after: str = ""
        """First date of a contest, included: "2024-08-01"; empty = no bound."""
        before: str = ""
        """First date that is left out; empty = no bound."""

    required: ClassVar[tuple[str, ...]] = ("question_content", "public_test_cases")
    optional: ClassVar[tuple[str, ...]] = ("private_test_cases", "starter_code", "metadata", "contest_date")

    @property
    def name(self) -> str:
        return "live_code_bench"

    @property
    def size(self) -> int:
        return len(self._numbers)

    def row(self, number: int) -> Problem:
        return super().row(self._numbers[number])

    def parse(self, row: Row) -> Problem:
        try:
            cases = [*_public(row), *_private(row)]
            function = json.loads(row.get("metadata") or "{}").get("func_name")
            for case in cases:
                case["fn_name"] = function if case.get("testtype") == "functional" else None
        except (ValueError, TypeError, AttributeError, zlib.error, pickle.UnpicklingError) as error:
            raise DataError(f"{row.place}: tests that are not in LiveCodeBench's form ({error})") from error
        tests = code_tests(row, cases, "python")
        problem, starter = row.text("question_content").strip(), str(row.get("starter_code") or "").rstrip()
        text = f"{problem}\n\nComplete this code:\n\n```python\n{starter}\n```" if starter else problem
        return Problem(text, answer="", metadata={"tests": tests})

    @cached_property
    def _numbers(self) -> list[int]:
        """The rows whose contest is between the dates."""
        after, before = self.config.after, self.config.before
        if not after and not before:
            return list(range(len(self.records)))
        dates = [str(row.get("contest_date") or "") for row in self.records]
        kept = [number for number, date in enumerate(dates) if date >= after and (not before or date < before)]
        if not kept:
            raise DataError(f"{self.config.source}: no contest from {after or 'the first'} to before {before or 'now'}")
        return kept


def _public(row: Row) -> list[dict[str, Any]]:
    return list(json.loads(row.text("public_test_cases")))


def _private(row: Row) -> list[dict[str, Any]]:
    """JSON, or JSON as a pickled text, compressed, in base64."""
    text = row.get("private_test_cases")
    if not text:
        return []
    if text.lstrip().startswith("["):
        return list(json.loads(text))
    return list(json.loads(_Texts(io.BytesIO(zlib.decompress(base64.b64decode(text)))).load()))


class _Texts(pickle.Unpickler):
    """Reads plain values only: a pickle of a data set may name any code to be run."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}; only a text is expected")
