"""Responses kept for reading: from groups to rows of `samples.jsonl`, and from rows to pairs for report.html."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from megatron_r1.report.journal import Row
from megatron_r1.seeds import stream_seed
from megatron_r1.types import Group, Sample

Pieces = Callable[[list[int]], list[str]]
"""Token ids -> what each adds to the text."""

QUESTIONS = 8
"""Questions kept of one call."""
RESPONSES = 2
"""Responses kept of each question: the first ones, not the best ones."""
SHOWN_ALONE = 4
"""Questions shown of a tag that has no counterpart."""


@dataclass(frozen=True)
class Exhibit:
    """One question of report.html with its responses, one column a tag."""

    question: str
    """What tells its prompt from the others: the template is left out."""
    prompt: str
    answer: str
    columns: list[Row]


def shown(groups: Sequence[Group], step: int) -> int:
    """Number of the group that is kept of a step of training: one, for rows with tokens are large.

    The tasks take turns, those of [general] and the members of a mixture included: in as many steps as there are, each
    is kept once. Every round has an order of its own, so that a browser that leaves out every other step sees all.
    """
    first: dict[str, int] = {}
    for number, group in enumerate(groups):
        first.setdefault(group.question.id.rpartition("-")[0], number)  # without the question's number: its task
    turn, place = divmod(step, len(first))
    return first[sorted(first, key=lambda task: stream_seed("shown", turn, task))[place]]


def sample_rows(step: int, groups: Sequence[Group], tag: str, pieces: Pieces | None = None) -> list[Row]:
    """The first `QUESTIONS` groups with the first `RESPONSES` responses of each, ready for JSON.

    With `pieces` they hold their tokens, too, and what engine and trainer make of each.
    """
    return [
        {
            "step": step,
            "tag": tag,
            "question_id": group.question.id,
            "task": group.question.member,
            "prompt": group.question.prompt,
            "question": group.question.metadata.get("text"),
            "answer": group.question.answer,
            "responses": [
                {
                    "text": sample.text,
                    "tokens": sample.length,
                    "finished": sample.finished,
                    "reward": sample.reward,
                    "rewards": sample.rewards,
                    **(_tokens(sample, pieces) if pieces else {}),
                }
                for sample in group.samples[:RESPONSES]
            ],
        }
        for group in groups[:QUESTIONS]
    ]


def _tokens(sample: Sample, pieces: Pieces) -> Row:
    trainer = sample.trainer_logprobs
    return {
        "pieces": pieces(sample.tokens),
        "engine_logprobs": _by_token(sample.logprobs, sample.mask),
        "trainer_logprobs": None if trainer is None else _by_token(trainer, sample.mask),
    }


def _by_token(values: Sequence[float], mask: Sequence[bool]) -> list[float | None]:
    """Numbers of sampled tokens, None at those of tools. [response]"""
    rounded = (round(value, 7) for value in values)
    return [next(rounded) if sampled else None for sampled in mask] if mask else list(rounded)


def exhibits(rows: Sequence[Row]) -> tuple[list[Exhibit], list[Exhibit]]:
    """Questions that were answered before and after, in two columns; and the latest of those that were not."""
    newest: dict[tuple[str, str], Row] = {(row["tag"], row["question_id"]): row for row in rows}
    before = {name: row for (tag, name), row in newest.items() if tag == "before"}
    after = {name: row for (tag, name), row in newest.items() if tag == "after"}
    pairs = [[before[name], after[name]] for name in before if name in after]
    paired = {row["question_id"] for pair in pairs for row in pair}
    others = [[row] for (tag, name), row in newest.items() if not (tag in ("before", "after") and name in paired)]
    others.sort(key=lambda columns: columns[0]["step"])
    singles = others[-SHOWN_ALONE:]
    template = _template([row["prompt"] for row in newest.values()])
    return [_exhibit(columns, template) for columns in pairs], [_exhibit(columns, template) for columns in singles]


def _exhibit(columns: list[Row], template: tuple[int, int]) -> Exhibit:
    prompt: str = columns[0]["prompt"]
    start, end = template
    question = prompt[start : len(prompt) - end].strip() or prompt
    return Exhibit(question, prompt, str(columns[0]["answer"]), columns)


def _template(prompts: list[str]) -> tuple[int, int]:
    """Characters of the template at the start and at the end of all prompts."""
    distinct = set(prompts)
    if len(distinct) < 2:
        return 0, 0
    head = _shared(distinct)
    start = max(head.rfind("\n"), head.rfind(":")) + 1
    tail = _shared({prompt[start:][::-1] for prompt in distinct})
    end = tail.rfind("\n") if "\n" in tail else tail.find(" ")
    return start, end + 1


def _shared(texts: set[str]) -> str:
    """The longest text that all of `texts` start with."""
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    return "".join(letters[0] for letters in same)
