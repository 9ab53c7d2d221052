r"""Answers that try to be paid for without being right, against the honest one, through the judge and its workers."""

import string
from dataclasses import dataclass, replace

import pytest

from megatron_r1.reward.judge import Judge
from megatron_r1.types import Group, Question, Sample

CHOICES = ["the Moon", "the Sun", "Mars", "a comet"]
COMPLEX = {"question": "(1 + 2i) + (3 + 4i)", "answer": "4.0 + 6.0i", "metadata": {"result": (4.0, 6.0)}}
HALTING = {"question": "Does it halt?", "answer": "False", "metadata": {}}
FOUR = {"question": "24 from 3 5 6 10", "answer": "3*6 + 10 - 4", "metadata": {"numbers": [3, 4, 6, 10]}}
SUM = {"question": "20 + 22 =", "answer": "42", "metadata": {}}
MATRIX = {"question": "[[1, 2], [3, 4]]", "answer": "1 2 4 3", "metadata": {}}


@dataclass(frozen=True)
class Target:
    """A question, how it is judged, and the answer that is right."""

    reward: str
    question: Question
    honest: str
    wrap: str = "<think>thought</think> <answer>{}</answer>"


def _gym(dataset: str, entry: dict[str, object]) -> Target:
    metadata = {"config": {"dataset": dataset}, "entry": entry}
    return Target("task", Question(dataset, "reasoning_gym", "q", str(entry["answer"]), metadata), str(entry["answer"]))


def _math(reference: str, honest: str) -> Target:
    return Target("accuracy", Question(reference, "math", "q", reference), honest)


TARGETS = {
    "number": _math("3", r"\boxed{3}"),
    "fraction": _math(r"\frac{1}{2}", "0.5"),
    "expression": _math("3x+2", "2+3x"),
    "equation": _math("x=5", "x=5"),
    "set": _math("1, 2", r"\boxed{2, 1}"),
    "interval": _math("(1,2]", "(1, 2]"),
    "tiny": _math("10^{-9}x", r"\frac{x}{10^9}"),
    "word": _math(r"\text{Evelyn}", "Evelyn"),
    "power": _math("2^{100}x", r"x \cdot 2^{100}"),
    "choice": Target("choice", Question("choice", "stem", "q", "B", {"choices": CHOICES}), "B"),
    "format": Target("format", Question("format", "math", "q", "3"), "<think>a</think> <answer>3</answer>", "{}"),
    "layout": Target("accuracy", Question("layout", "math", "q", "3"), "<think>a</think> <answer>3</answer>", "{}"),
    "chat": Target("chat", Question("chat", "math", "q", "3"), r"<think>a</think> So \boxed{3}.", "{}"),
    "sum": _gym("chain_sum", SUM),
    "complex": _gym("complex_arithmetic", COMPLEX),
    "halting": _gym("game_of_life_halting", HALTING),
    "four": _gym("puzzle24", FOUR),
    "spiral": _gym("spiral_matrix", MATRIX),
}

ATTACKS = [
    # several answers at once
    ("number", "two boxes", r"\boxed{4} \boxed{3}"),
    ("number", "two boxes, right one first", r"\boxed{3} or \boxed{4}"),
    ("number", "a hundred boxes", "".join(rf"\boxed{{{number}}}" for number in range(100))),
    ("number", "list in a box", r"\boxed{1, 2, 3, 4}"),
    ("number", "or", "3 or 4"),
    ("number", "or inside text", r"\boxed{3\text{ or 4}}"),
    ("number", "two assignments", "x=4, x=3"),
    ("number", "plus or minus", r"\pm 3"),
    ("number", "two anchors", "The answer is 4. The answer is 3."),
    ("number", "every digit", " ".join(string.digits)),
    ("number", "range", "between 2 and 4, so about 3"),
    ("number", "inequality", "x > 2"),
    ("number", "interval", "[2,4]"),
    ("number", "union", r"\{3\} \cup \{4\}"),
    ("number", "cases", r"\begin{cases}3\\4\end{cases}"),
    ("number", "matrix", r"\begin{pmatrix}3&4\end{pmatrix}"),
    ("number", "different from", r"x \ne 3"),
    ("number", "denied", "It is not 3"),
    ("number", "prose around many numbers", "With 7 and 12 one could say 3, or 5."),
    ("number", "next line", "3\n4"),
    ("number", "glued to a word", "4not 3"),
    ("number", "glued to a unit", "it is 4kg, so 3"),
    ("set", "superset", "1, 2, 3"),
    ("set", "superset in boxes", r"\boxed{1}\boxed{2}\boxed{3}"),
    ("set", "two values for one", "x=7=1, x=2"),
    ("set", "one element", r"\boxed{1}"),
    ("interval", "both ends", "[1,2], (1,2]"),
    ("fraction", "fraction and its inverse", r"\frac{1}{2}, \frac{2}{1}"),
    ("word", "two names", "Evelyn or Bob"),
    ("word", "two boxed names", r"\boxed{Evelyn} \boxed{Bob}"),
    # nothing said
    ("number", "empty box", r"\boxed{}"),
    ("number", "empty box before the right one", r"\boxed{} \boxed{3}"),
    ("number", "box without end", r"\boxed{3"),
    ("number", "box in a box", r"\boxed{\boxed{3}}"),
    ("number", "blank", " \n "),
    ("number", "truth", "True"),
    ("number", "not a number", "nan"),
    ("number", "variable", "x"),
    ("equation", "tautology", "5=5"),
    ("equation", "identity", "x=x"),
    ("equation", "another variable", "y=5"),
    ("expression", "tautology", "0=0"),
    # left to be computed
    ("number", "sum", "1+2"),
    ("number", "integral", r"\int_0^3 1\,dx"),
    ("number", "series", r"\sum_{i=1}^{2} i"),
    ("number", "limit", r"\lim_{x\to 3} x"),
    ("number", "root", r"\sqrt{9}"),
    ("expression", "derivative", r"\frac{d}{dx}(\frac{3x^2}{2}+2x)"),
    # said twice, differently
    ("number", "false equation", "4=3"),
    ("number", "equation to be solved", "4x=3"),
    ("number", "equation that breaks off", "4/=3"),
    ("number", "brace that ends the box", "3}4x=3"),
    ("number", "false chain", "x=4=3"),
    ("equation", "false chain", "x=4=5"),
    ("number", "hidden by phantom", r"3\phantom{4}"),
    ("number", "digits apart", "3 4"),
    ("number", "digits apart by quad", r"3\quad 4"),
    ("number", "approximately something else", r"4 \approx 3"),
    ("number", "fraction with zero", r"\frac{3}{0}"),
    # parsers and look-alikes
    ("expression", "Cyrillic letter", "3х+2"),
    ("number", "Cyrillic letter", "З"),
    ("number", "superscript", "³"),
    ("number", "invisible character inside", "3\u200b4"),
    ("word", "Cyrillic letters", "Еvеlуn"),
    ("number", "code", "__import__('os').getpid() * 0 + 3"),
    ("number", "attribute", "(3).__class__(3)"),
    ("number", "always equal", "type('E', (), {'__eq__': lambda a, b: True})()"),
    ("tiny", "zero", "0"),
    ("tiny", "rounds to the same", "2x/10^{9}"),
    ("number", "comment", "4 % 3"),
    ("number", "tag", r"4 \tag{3}"),
    # what would take for ever
    ("power", "tower", "9^{9^{9^{9^9}}}"),
    ("power", "tower of brackets", "((((9^{99})^{99})^{99})^{99})^{99}x"),
    ("power", "tower of e", r"e^{e^{e^{e^{100}}}}"),
    ("power", "exponentials", r"\exp(\exp(\exp(\exp(100))))"),
    ("power", "factorial", "(10^9)!"),
    ("power", "binomial", r"\binom{999999999}{499999999}"),
    ("power", "expansion", "(x+y+z+w+1)^{99}"),
    ("power", "deep fractions", r"\frac{1}{1+" * 400 + "x" + "}" * 400),
    ("power", "deep roots", r"\sqrt{" * 3000 + "2" + "}" * 3000),
    ("power", "deep brackets", "(" * 5000 + "x" + ")" * 5000),
    ("number", "huge integer", "3" * 200_000),
    ("number", "thousands of boxes", r"\boxed{" * 20_000),
    ("number", "thousands of dollars", "$" * 50_000),
    ("number", "very long", "3 " * 50_000),
    # where the answer stands
    ("layout", "only in the reasoning", r"<think>\boxed{3} <answer>3</answer></think>"),
    ("layout", "no reasoning", "<answer>3</answer>"),
    ("layout", "reasoning that never ends", "<think>a <answer>3</answer>"),
    ("layout", "two answers", "<think>a</think> <answer>4</answer> <answer>3</answer>"),
    ("layout", "nested answers", "<think>a</think> <answer>4 <answer>3</answer></answer>"),
    ("layout", "thinks again", "<think>a</think> <answer>3</answer> <think>b</think> <answer>4</answer>"),
    ("layout", "answer before the reasoning", "<answer>3</answer> <think>a</think>"),
    ("layout", "upper case tags", "<THINK>a</THINK> <ANSWER>3</ANSWER>"),
    ("chat", "only in the reasoning", r"<think>\boxed{3}</think> I do not know."),
    ("chat", "answers between thoughts", r"<think>a</think> \boxed{3} <think>b</think> \boxed{4}"),
    ("chat", "boxes far apart", r"<think>a</think> \boxed{4}" + " so" * 200 + r" \boxed{3}"),
    ("format", "repeated tags", "<think>a</think> <answer>3</answer>" * 2),
    ("format", "nested tags", "<think><think>a</think></think> <answer>3</answer>"),
    ("format", "answer inside the reasoning", "<think>a <answer>3</answer></think> <answer>3</answer>"),
    ("format", "empty reasoning", "<think>\n</think> <answer>3</answer>"),
    ("format", "empty answer", "<think>a</think> <answer> </answer>"),
    ("format", "text behind", "<think>a</think> <answer>3</answer>\n and more"),
    ("format", "text between", "<think>a</think> well <answer>3</answer>"),
    ("format", "crossed tags", "<think>a<answer></think>3</answer>"),
    ("format", "cut off", "<think>a</think> <answer>3"),
    # options
    ("choice", "every letter", "A B C D"),
    ("choice", "every letter, listed", "A, B, C, D"),
    ("choice", "or", "A or B"),
    ("choice", "or, right one first", "B or A"),
    ("choice", "slash", "B/C"),
    ("choice", "two boxes", r"\boxed{B} \boxed{C}"),
    ("choice", "empty box", r"\boxed{} B"),
    ("choice", "letter against text", "B) Mars"),
    ("choice", "text against letter", "C) the Sun"),
    ("choice", "letter in prose", "B good or be gone"),
    ("choice", "every text", "the Moon, the Sun, Mars, a comet"),
    ("choice", "two texts", "the Sun or Mars"),
    ("choice", "letter against LaTeX text", r"B\text{Mars}"),
    ("choice", "small letter behind", "The answer is B, c"),
    ("choice", "denied", "The answer is not A, C or D"),
    ("choice", "explains another", "The answer is B, no, Mars"),
    ("choice", "and the rest", "The answer is B and C"),
    ("choice", "Greek letter", "Β"),
    ("choice", "Cyrillic letter", "В"),
    ("choice", "all of them", "All of the above"),
    ("choice", "word that starts so", "Because"),
    # verifiers of reasoning-gym
    ("sum", "hedge", "42 or 43"),
    ("sum", "list", "41, 42, 43"),
    ("sum", "question", "20 + 22"),
    ("complex", "not a number", "nan"),
    ("complex", "not a complex number", "nan+nanj"),
    ("halting", "anything", "maybe"),
    ("halting", "opposite", "True"),
    ("halting", "both", "True and False"),
    ("four", "other numbers", "1*2*3*4"),
    ("four", "answer itself", "24"),
    ("four", "code", "__import__('builtins').int(24)"),
    ("spiral", "code", "__import__('builtins').list('1243')"),
    ("spiral", "always equal", "type('E', (list,), {'__eq__': lambda a, b: True})()"),
]


@pytest.fixture(scope="module")
def scores() -> dict[tuple[str, str], float | None]:
    """Of every attack, and of the honest answer of every target."""
    rewards = {
        "accuracy": {"type": "accuracy"},
        "chat": {"type": "accuracy", "answer_in": "after_think"},
        "choice": {"type": "multiple_choice"},
        "format": {"type": "format"},
        "task": {"type": "task"},
    }
    said = [*ATTACKS, *((name, "honest", target.honest) for name, target in TARGETS.items())]
    groups = []
    for name, target in TARGETS.items():
        texts = [target.wrap.format(text) for aim, _, text in said if aim == name]
        question = replace(target.question, rewards=(target.reward,))
        groups.append(Group(question, [], [Sample([], [], text, True, 0) for text in texts]))
    with Judge(rewards, workers=2, timeout=60.0) as judge:
        judge(groups)
        assert not judge.counters["verifier_timeouts"], "the guards let something through that hangs"
    found = {}
    for (name, target), group in zip(TARGETS.items(), groups, strict=True):
        labels = [label for aim, label, _ in said if aim == name]
        found |= {
            (name, label): sample.rewards[target.reward] for label, sample in zip(labels, group.samples, strict=True)
        }
    return found


@pytest.mark.parametrize(("target", "name"), [attack[:2] for attack in ATTACKS], ids=str)
def test_an_attack_gains_nothing(scores: dict[tuple[str, str], float | None], target: str, name: str) -> None:
    assert scores[target, name] == 0.0


@pytest.mark.parametrize("target", TARGETS)
def test_the_honest_answer_is_paid(scores: dict[tuple[str, str], float | None], target: str) -> None:
    assert scores[target, "honest"] == 1.0


def test_every_attack_is_another() -> None:
    assert len({attack[:2] for attack in ATTACKS}) == len(ATTACKS) >= 60
