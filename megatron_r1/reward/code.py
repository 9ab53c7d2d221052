"""Code reward: the program in the answer is run against the question's tests, in a sandbox."""

import atexit
import math
import time
from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import FiniteFloat, NonNegativeFloat, PositiveFloat

from megatron_r1.config.code_tests import CodeTests
from megatron_r1.errors import EngineError
from megatron_r1.reward.base import Reward
from megatron_r1.reward.code_blocks import last_block
from megatron_r1.reward.code_outputs import same_first_lines, same_output
from megatron_r1.reward.code_tests import checks_of, limits_for, read_tests
from megatron_r1.reward.response import AnswerIn, extract_answer, response
from megatron_r1.reward.sandbox.choice import SandboxSection, open_executor
from megatron_r1.reward.sandbox.job import Executor, Program, Run
from megatron_r1.reward.sandbox.remote import QUEUE_SECONDS
from megatron_r1.types import Group, Question, Sample

Mode = Literal["pass", "fraction", "weighted", "subtasks"]


class Code(Reward):
    """Score of the last block of code in the answer, in the language of `question.metadata["tests"]`.

    * `pass`: 1.0 when all tests pass, otherwise 0.0. DeepSeek-R1 (arXiv 2501.12948), 2.2; open-r1's `binary_code`.
    * `fraction`: share of the tests that pass; open-r1's `code`.
    * `weighted`: `pass` + 0.1 x `fraction`; open-r1's `cf_code` with `weighted_sum`.
    * `subtasks`: points of the subtasks whose tests all pass, as a share of all points; open-r1's `ioi_code`. A
      question without subtasks gets its `fraction`.

    All lines of the output are compared. (open-r1's `code_reward` compares as many as the shorter text has, so the
    first line alone is enough; and one test over the time limit takes the whole sample to 0, whatever else passed.)
    A question without tests gets None.
    """

    class Config(SandboxSection):
        """[rewards.<name>] with type = "code": the sandbox's keys and these."""

        mode: Mode = "pass"
        answer_in: AnswerIn = "tags"
        no_code: FiniteFloat = 0.0
        """Score of an answer without a block of code. open-r1's `cf_code`: -1.0."""
        compile_error: FiniteFloat = 0.0
        """Score of a program that the compiler refuses (Python has none). open-r1's `cf_code`: -0.1."""
        float_tolerance: NonNegativeFloat | None = None
        """Numbers that differ by at most this, absolutely or relatively, are the same. Default: they are text."""
        max_seconds: PositiveFloat = 60.0
        """All tests of one sample together, from the start of the first; those not begun by then are failed."""
        compatible: Literal["open-r1"] | None = None
        """Compare lines, and treat time limits, as open-r1's `code_reward` does."""

    isolated: ClassVar[bool] = True
    judges_correctness: ClassVar[bool] = True

    def __init__(self, config: Config) -> None:
        self.config: Code.Config = config
        self._executor: Executor | None = None
        self._read: tuple[Question, CodeTests | None] | None = None

    @property
    def deadline(self) -> float:
        """`max_seconds`, as long again for the test that was begun last, a compilation, and the wait for a sandbox."""
        wait = 20.0 if self.config.url is None else 20.0 + QUEUE_SECONDS
        return 2 * self.config.max_seconds + self.config.limits.compile_seconds + wait

    def __call__(self, group: Group) -> list[float | None]:
        """One score a sample. [samples]

        Raises:
            DataError: the question's tests are not in the form that `code_tests` says.
            EngineError: the sandbox does not work here, or is out of reach.
        """
        tests = self._tests(group.question)
        if tests is None:
            return [None for _ in group.samples]
        return [self._score(group.question, tests, sample) for sample in group.samples]

    def close(self) -> None:
        """End the sandbox; the next call starts another."""
        if self._executor is not None:
            self._executor.close()
            self._executor = None

    def _tests(self, question: Question) -> CodeTests | None:
        """The question's tests, of which there may be megabytes: read once for all of its samples."""
        if self._read is None or self._read[0] is not question:
            self._read = question, read_tests(question)
        return self._read[1]

    @property
    def failure_score(self) -> float:
        """Otherwise a program would gain by killing its worker."""
        return min(0.0, self.config.no_code, self.config.compile_error)

    def prepare(self) -> None:
        """Start the sandbox, or reach it, and have it run something.

        Raises:
            ConfigError: a token is missing.
            EngineError: the sandbox does not work here, is out of reach, or does not run Python.
        """
        for run in self._open().run(Program("python", "print(6 * 7)"), [""], self.config.limits):
            if run.stdout.strip() != "42":
                raise EngineError(
                    f"sandbox = {self.config.sandbox!r} does not run Python: a program that prints 42 ended as "
                    f"{run.status!r} and printed {run.stdout[:200]!r} {run.stderr[-200:]!r}"
                )

    def _open(self) -> Executor:
        """The executor, in the process that scores."""
        if self._executor is None:
            self._executor = open_executor(self.config)
            atexit.register(self.close)
        return self._executor

    def _score(self, question: Question, tests: CodeTests, sample: Sample) -> float:
        answer = extract_answer(response(question, sample), self.config.answer_in)
        source = last_block(answer or "", tests.language)
        if source is None:
            return self.config.no_code
        passed: list[bool] = []
        started = math.inf
        for run, ok in self._outcomes(question, tests, source):
            now = time.monotonic()
            started = min(started, now - run.seconds)  # a server may have had others to serve before
            if run.status == "compile_error":
                return self.config.compile_error
            if run.status == "timeout" and self.config.compatible == "open-r1":
                return 0.0
            passed.append(ok)
            if not ok and self.config.mode == "pass":
                return 0.0
            if now - started > self.config.max_seconds:
                break
        passed += [False] * (tests.count - len(passed))
        return combine(self.config.mode, passed, tests)

    def _outcomes(self, question: Question, tests: CodeTests, source: str) -> Iterator[tuple[Run, bool]]:
        """Each test's run and whether it passed, in order."""
        limits = limits_for(tests, self.config.limits, question)
        if limits.wall_seconds > self.config.max_seconds:
            limits = limits.model_copy(update={"wall_seconds": self.config.max_seconds})
        executor = self._open()
        if tests.stdin:
            program = Program(tests.language, f"{tests.prelude}\n{source}" if tests.prelude else source)
            runs = executor.run(program, [test.input for test in tests.stdin], limits)
            for test, run in zip(tests.stdin, runs, strict=False):
                yield run, run.status == "ok" and self._same(run.stdout, test.output)
        checks = checks_of(tests, self.config.float_tolerance)
        if checks:
            for run in executor.check(Program(tests.language, source), tests.prelude, checks, limits):
                yield run, run.status == "ok"

    def _same(self, printed: str, expected: str) -> bool:
        if self.config.compatible == "open-r1":
            return same_first_lines(printed, expected)
        return same_output(printed, expected, self.config.float_tolerance)


def combine(mode: Mode, passed: list[bool], tests: CodeTests) -> float:
    """The score of a sample from its tests, of which there is at least one."""
    if mode == "subtasks" and tests.subtasks:
        points = sum(subtask.points for subtask in tests.subtasks)
        reached = sum(s.points for s in tests.subtasks if all(passed[number] for number in s.tests))
        return reached / points if points else 0.0
    fraction = sum(passed) / len(passed)
    if mode in ("fraction", "subtasks"):
        return fraction
    return float(all(passed)) + (0.1 * fraction if mode == "weighted" else 0.0)
