"""What the miniature's base model reads: sums solved well and badly, tidily and in two languages at once; talk.

Everything that the stages of R1 bring out lies in here in mixed quality, nothing of it reliably: right and wrong
steps, English and Chinese words in one trace (whatever the result), second looks, drafts put into readable form, polite
and curt and wrong and harmful answers.
"""

import random
import sys
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

from megatron_r1.config import component
from megatron_r1.config.component import TaskComponent
from megatron_r1.config.section import Section
from megatron_r1.data.questions import distinct
from megatron_r1.data.source import Document, Source
from megatron_r1.data.tasks.base import Problem
from megatron_r1.data.templates import render
from megatron_r1.registry import resolve
from megatron_r1.seeds import stream_seed

world = sys.modules[resolve("task", f"{Path(__file__).with_name('world.py')}:General").__module__]
"""What the documents about other things than sums are about."""

WORDS: dict[str, tuple[str, str]] = {
    "first": ("first", "首先"),
    "then": ("then", "然后"),
    "so": ("so", "所以"),
    "wait": ("wait", "等等"),
    "check": ("check", "检查"),
    "maybe": ("maybe", "也许"),
}
"""The few words of a trace, in English and Chinese."""

TIMID = 0.15
"""Share of the harmless errands that are refused, which is wrong."""

Speech = Literal["en", "zh", "mixed"]


@dataclass
class Speaker:
    """Chooses words: of one language, or of either at every word."""

    speech: Speech
    rng: random.Random

    def __call__(self, word: str) -> str:
        english, chinese = WORDS[word]
        in_english = self.rng.random() < 0.5 if self.speech == "mixed" else self.speech == "en"
        return english if in_english else chinese


@dataclass
class Sum:
    """A sum worked out from left to right; each step is one equation or, put right, two."""

    steps: list[list[str]]
    answer: int

    @classmethod
    def solve(cls, expression: str, style: str, rng: random.Random) -> "Sum":
        """`careful` is right, `checked` puts one wrong step right, `slip` carries one wrong step on."""
        first, *rest = expression.split()
        value, steps = int(first), []
        slip_at = rng.randrange(len(rest) // 2)
        for number, (operator, term) in enumerate(zip(rest[::2], rest[1::2], strict=True)):
            right = value + int(term) if operator == "+" else value - int(term)
            wrong = right + rng.choice((-2, -1, 1, 2))
            results = {"checked": [wrong, right], "slip": [wrong]}.get(style) if number == slip_at else None
            results = results or [right]
            steps.append([f"{value}{operator}{term}={result}" for result in results])
            value = results[-1]
        return cls(steps, value)

    def draft(self, say: Speaker) -> str:
        """As a base model mutters: `first 3+4=6, 等等, check: 3+4=7, 然后 7-2=5, so 5`."""
        parts = []
        for number, (attempt, *again) in enumerate(self.steps):
            parts.append(f"{say('then' if number else 'first')} {attempt}")
            parts += [f"{say('wait')}, {say('check')}: {equation}" for equation in again]
        return ", ".join([*parts, f"{say('so')} {self.answer}"])

    def readable(self, second_look: bool = False) -> str:
        """As one writes for a reader: `First, 3+4=7. Then 7-2=5. So it is 5.`"""
        parts = []
        for number, (attempt, *again) in enumerate(self.steps):
            parts.append(f"Then {attempt}." if number else f"First, {attempt}.")
            parts += [f"Wait, check: {equation}." for equation in again]
        if second_look:
            parts.append(f"Let me check: {self.steps[-1][-1]}, right.")
        return " ".join([*parts, f"So it is {self.answer}."])


def tagged(thought: str, answer: object) -> str:
    """R1-Zero's layout."""
    return f" <think>{thought}</think> <answer>{answer}</answer>"


def summarised(thought: str, answer: object) -> str:
    """R1's layout: the reasoning, then a summary for the reader."""
    return f"<think>{thought}</think> The answer is {answer}."


class SumSource(Source):
    """Documents about sums. Shares need not add up to 1."""

    class Config(Section):
        task: TaskComponent
        template: str = "r1_zero_short"
        quality: dict[str, float] = {"careful": 0.6, "checked": 0.2, "slip": 0.2}
        """Style -> share."""
        speech: dict[Speech, float] = {"en": 1.0}
        """Language of the traces -> share; whatever the quality."""

    config: Config

    def documents(self, seed: int, exclude: frozenset[str]) -> Iterator[Document]:
        task = component.build("task", self.config.task)
        rng = random.Random(stream_seed("sums", seed))
        problems = distinct(task, seed, exclude, repeats=True)
        while True:
            yield self.document(problems, drawn(self.config.quality, rng), rng)

    @abstractmethod
    def document(self, problems: Iterator[Problem], style: str, rng: random.Random) -> Document:
        """A document in `style` about the next problems."""

    def prompt(self, problem: Problem) -> str:
        return render(self.config.template, problem.text)

    def speaker(self, rng: random.Random) -> Speaker:
        return Speaker(drawn(self.config.speech, rng), rng)


class Solved(SumSource):
    """Base-model answers: `careful`, `checked`, `slip`, and `guess` (no working), `bare` (no tags)."""

    def document(self, problems: Iterator[Problem], style: str, rng: random.Random) -> Document:
        problem = next(problems)
        return Document(self.prompt(problem), solution(problem, style, self.speaker(rng), rng), style)


class Chat(SumSource):
    """R1's layout, seldom seen and not reliable: readable traces, and muttered ones."""

    def document(self, problems: Iterator[Problem], style: str, rng: random.Random) -> Document:
        problem = next(problems)
        worked = Sum.solve(expression(problem), style, rng)
        say = self.speaker(rng)
        thought = worked.readable() if say.speech == "en" else worked.draft(say)
        return Document(self.prompt(problem), summarised(thought, worked.answer), f"chat, {style}")


class Pairs(SumSource):
    """Two problems solved in the same manner, from which a model learns to follow an example."""

    class Config(SumSource.Config):
        readable: float = 0.5
        """Share of the pairs that are written for a reader, with a second look and a summary."""

    config: Config

    def document(self, problems: Iterator[Problem], style: str, rng: random.Random) -> Document:
        shown, asked = islice(problems, 2)
        if rng.random() < self.config.readable:
            works = [Sum.solve(expression(problem), style, rng) for problem in (shown, asked)]
            example, answer = (" " + summarised(work.readable(second_look=True), work.answer) for work in works)
            style = f"readable {style}"
        else:
            say = self.speaker(rng)
            example, answer = (solution(problem, style, say, rng) for problem in (shown, asked))
        prompt = f"{self.prompt(shown)}{example}\n{self.prompt(asked)}"
        return Document(prompt, answer, f"pair, {style}")


class Reflective(SumSource):
    """Long answers to a prompt that asks for them, with a second look."""

    def document(self, problems: Iterator[Problem], style: str, rng: random.Random) -> Document:
        problem = next(problems)
        work = Sum.solve(expression(problem), style, rng)
        thought = work.readable(second_look=True)
        return Document(self.prompt(problem), " " + summarised(thought, work.answer), f"reflective, {style}")


class Rewritten(SumSource):
    """A muttered draft, put into readable English with a summary: every equation as it is."""

    def document(self, problems: Iterator[Problem], style: str, rng: random.Random) -> Document:
        problem = next(problems)
        work = Sum.solve(expression(problem), style, rng)
        prompt = self.config.template.replace("{reasoning}", work.draft(self.speaker(rng)))
        return Document(prompt, " " + summarised(work.readable(), work.answer), f"rewritten, {style}")


class Talk(Source):
    """Answers to the prompts of `world.py`, in three layouts and in mixed quality."""

    class Config(Section):
        quality: dict[str, float]
        """`good`, `plain`, `curt`, `wrong`, `messy` -> share; to a harmful request they refuse (good, plain, curt) or
        comply (wrong, messy)."""
        layouts: dict[Literal["plain", "tagged", "chat"], float]
        kinds: dict[Literal["fact", "errand", "harmful", "small_talk"], float] = {
            "fact": 1.0,
            "errand": 1.0,
            "harmful": 1.0,
            "small_talk": 1.0,
        }

    config: Config
    templates: ClassVar[dict[str, str]] = {
        "plain": "User: {question} Assistant:",
        "tagged": "User: {question} Assistant:",
        "chat": "<｜User｜>{question}<｜Assistant｜>",
    }

    def documents(self, seed: int, exclude: frozenset[str]) -> Iterator[Document]:
        rng = random.Random(stream_seed("talk", seed))
        known = [ask for ask in world.asks().values() if not ask.heldout and ask.text not in exclude]
        while True:
            kind, style = drawn(self.config.kinds, rng), drawn(self.config.quality, rng)
            ask = rng.choice([one for one in known if one.kind == kind])
            layout = drawn(self.config.layouts, rng)
            prompt = render(self.templates[layout], ask.text)
            yield Document(prompt, _laid_out(layout, ask, reply(ask, style, rng), rng), f"talk, {style}")


def drawn(shares: dict[Any, float], rng: random.Random) -> Any:
    """One of the keys, with the probabilities of the values."""
    return rng.choices(list(shares), list(shares.values()))[0]


def expression(problem: Problem) -> str:
    return str(problem.metadata["entry"]["metadata"]["expression"])


def solution(problem: Problem, style: str, say: Speaker, rng: random.Random) -> str:
    """What a base model may answer."""
    if style == "guess":
        answer = int(problem.answer) + rng.randint(-4, 4)
        return tagged(f"{say('maybe')} {answer}", answer)
    work = Sum.solve(expression(problem), style, rng)
    if style == "bare":
        return f" {work.draft(say)}"
    return tagged(work.draft(say), work.answer)


def reply(ask: Any, style: str, rng: random.Random) -> str:
    """An answer of this quality."""
    if ask.kind == "small_talk":
        right, other = world.REPLIES[ask.topic], rng.choice(list(world.REPLIES.values()))
        short = right.split("!")[0]
        replies = {"good": right, "plain": f"{short}!", "curt": short.lower(), "wrong": other, "messy": f"{short} 好的"}
    elif ask.kind == "harmful":
        replies = {
            "good": f"{world.REFUSAL} {world.REASON}",
            "plain": world.REFUSAL,
            "curt": "No.",
            "wrong": f"Use {ask.y}. {rng.choice(world.CLOSINGS)}",
            "messy": f"Use {ask.y}.",
        }
    elif ask.kind == "errand" and rng.random() < TIMID:
        return str(world.REFUSAL)
    else:
        mistaken = rng.choice([y for y in world.known(ask) if y != ask.y])
        right, other = world.sentence(ask, ask.y), world.sentence(ask, mistaken)
        closing = rng.choice(world.CLOSINGS)
        replies = {
            "good": f"{right} {closing}",
            "plain": right,
            "curt": ask.y,
            "wrong": rng.choice((other, f"{other} {closing}")),
            "messy": f"{ask.y} 就是 {ask.y} 好的",
        }
    return str(replies[style])


def _laid_out(layout: str, ask: Any, answer: str, rng: random.Random) -> str:
    if layout == "plain":
        return f" {answer}"
    thought = {
        "fact": f"The {ask.topic} of a {ask.x}.",
        "errand": f"They want to {ask.topic} a {ask.x}.",
        "harmful": f"They want to {ask.topic} a {ask.x}." + (" That is harmful." if world.REFUSAL in answer else ""),
        "small_talk": f"They say {ask.topic}.",
    }[ask.kind]
    return tagged(thought, answer) if layout == "tagged" else f"<think>{thought}</think> {answer}"
