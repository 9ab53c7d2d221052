"""Worked solutions in text, in styles of different quality.

A base model that has read the mixture samples good and bad modes, so reinforcement learning has something
to improve and is not handed the answer: the right steps are in the model, their share is not.

Every response starts with a space, as a document's text is prompt + solution and a prompt ends without one.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pydantic import NonNegativeFloat

from megatron_r1.config import component
from megatron_r1.config.component import TaskComponent
from megatron_r1.config.section import Section
from megatron_r1.data.questions import distinct
from megatron_r1.data.source import Document, Source
from megatron_r1.data.tasks.base import Problem, Task
from megatron_r1.data.templates import render
from megatron_r1.errors import ConfigError, nearest

Style = Callable[[Problem, random.Random], str]


@dataclass(frozen=True)
class Step:
    """One binary operation, `left operator right = result`."""

    left: int
    operator: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left}{self.operator}{self.right}={self.result}"


def _apply(left: int, operator: str, right: int) -> int:
    return left + right if operator == "+" else left - right


def _steps(expression: str, slip_at: int | None = None, slip: int = 0) -> list[Step]:
    """Left-to-right evaluation of `a + b - c ...`; step `slip_at` comes out wrong by `slip` and carries on."""
    first, *rest = expression.split()
    value, steps = int(first), []
    for number, (operator, term) in enumerate(zip(rest[::2], rest[1::2], strict=True)):
        result = _apply(value, operator, int(term)) + (slip if number == slip_at else 0)
        steps.append(Step(value, operator, int(term), result))
        value = result
    return steps


def _slip(rng: random.Random) -> int:
    """How far off a slip is: the near misses of somebody who counts."""
    return rng.choice((-2, -1, 1, 2))


def _tagged(thought: object, answer: object) -> str:
    return f" <think>{thought}</think> <answer>{answer}</answer>"


def _joined(steps: Sequence[object]) -> str:
    return ", ".join(map(str, steps))


class ChainSum:
    """Solutions of reasoning-gym's `chain_sum` (sums and differences, left to right)."""

    @staticmethod
    def careful(problem: Problem, rng: random.Random) -> str:
        """Step by step, right."""
        return _tagged(_joined(_steps(_expression(problem)) or [problem.answer]), problem.answer)

    @staticmethod
    def checked(problem: Problem, rng: random.Random) -> str:
        """A step goes wrong, is noticed and put right; right in the end."""
        steps = _steps(_expression(problem))
        if not steps:
            return ChainSum.careful(problem, rng)
        at = rng.randrange(len(steps))
        right = steps[at]
        wrong = Step(right.left, right.operator, right.right, right.result + _slip(rng))
        return _tagged(_joined([*steps[:at], f"{wrong}, wait, check: {right}", *steps[at + 1 :]]), problem.answer)

    @staticmethod
    def slip(problem: Problem, rng: random.Random) -> str:
        """One arithmetic slip that nobody notices: well formed, wrong."""
        expression = _expression(problem)
        terms = len(expression.split()) // 2
        off = _slip(rng)
        if not terms:
            return _tagged(int(problem.answer) + off, int(problem.answer) + off)
        steps = _steps(expression, slip_at=rng.randrange(terms), slip=off)
        return _tagged(_joined(steps), steps[-1].result)

    @staticmethod
    def guess(problem: Problem, rng: random.Random) -> str:
        """No working; the answer is right now and then."""
        answer = int(problem.answer) + rng.randint(-4, 4)
        return _tagged(f"maybe {answer}", answer)

    @staticmethod
    def bare(problem: Problem, rng: random.Random) -> str:
        """Right working, no tags."""
        return f" {_joined(_steps(_expression(problem)) or [problem.answer])}. The answer is {problem.answer}."


def _expression(problem: Problem) -> str:
    return str(problem.metadata["entry"]["metadata"]["expression"])


SOLUTIONS: dict[str, dict[str, Style]] = {
    "chain_sum": {
        "careful": ChainSum.careful,
        "checked": ChainSum.checked,
        "slip": ChainSum.slip,
        "guess": ChainSum.guess,
        "bare": ChainSum.bare,
    },
}
"""Task name -> style -> solver. Another task becomes available by adding its styles here."""


def styles(task: str) -> dict[str, Style]:
    """The styles of solution that exist for a task.

    Raises:
        ConfigError: nobody has written solutions for that task.
    """
    if task not in SOLUTIONS:
        raise ConfigError(
            f"there are no worked solutions for {task!r}{nearest(task, SOLUTIONS)}; "
            f"available: {', '.join(sorted(SOLUTIONS))}"
        )
    return SOLUTIONS[task]


class Worked(Source):
    """Problems of a task in a prompt template, solved in styles of different quality."""

    class Config(Section):
        task: TaskComponent
        template: str = "r1_zero"
        quality: dict[str, NonNegativeFloat]
        """Style of solution -> share of the documents (shares are normalised)."""

    def __init__(self, config: Config) -> None:
        """Raises ConfigError for an unknown task, style or template, or shares that sum to zero."""
        super().__init__(config)
        self._task: Task = component.build("task", config.task)
        self._styles = styles(self._task.name)
        render(config.template, "")
        for name in config.quality:
            if name not in self._styles:
                raise ConfigError(
                    f"quality: {self._task.name!r} has no style {name!r}{nearest(name, self._styles)}; "
                    f"it has {', '.join(self._styles)}"
                )
        if sum(config.quality.values()) <= 0:
            raise ConfigError(
                f"quality: the shares {config.quality} sum to 0; give at least one style a positive share"
            )

    def documents(self, seed: int, exclude: frozenset[str]) -> Iterator[Document]:
        rng = random.Random(seed)
        names, shares = list(self.config.quality), list(self.config.quality.values())
        for problem in distinct(self._task, seed, exclude, repeats=True):
            style = rng.choices(names, shares)[0]
            prompt = render(self.config.template, problem.text)
            yield Document(prompt, self._styles[style](problem, rng), style)
