"""Preference pairs: which of two responses does the judge prefer, and is it sure?"""

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_r1.config.preferences import PreferencesConfig
from megatron_r1.curate import comparison, lengths
from megatron_r1.curate.comparison import Comparison, Votes, exchanged
from megatron_r1.curate.responses import Dropped, Response, Responses
from megatron_r1.curate.verdicts import Query, Verdicts
from megatron_r1.reward.prompt import Prompt
from megatron_r1.seeds import stream_seed
from megatron_r1.types import Question

Row = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt."""

    question: Question
    first: Response
    second: Response

    @property
    def id(self) -> str:
        return f"{self.question.id}/{self.first.id}/{self.second.id}"

    def row(self, votes: Votes) -> Row:
        """As it stands in `pairs.jsonl`."""
        side = 1 if votes.mean > 0 else -1
        chosen, rejected = (self.first, self.second)[::side]
        return {
            "prompt": self.question.prompt,
            "chosen": chosen.text,
            "rejected": rejected.text,
            "question_id": self.question.id,
            "question": self.question.metadata["text"],
            "margin": abs(votes.mean),
            "votes": [side * score for score in votes.scores],
            "chosen_model": chosen.model,
            "rejected_model": rejected.model,
            "chosen_length": chosen.length,
            "rejected_length": rejected.length,
        }


def compare(
    config: PreferencesConfig, responses: Responses, judge: Verdicts[Comparison]
) -> tuple[list[Row], list[Dropped], dict[str, Any]]:
    """Pairs that are kept, what was dropped and why, and the figures.

    Raises:
        ConfigError: a prompt file that cannot be used, or an endpoint that does not accept what it is sent.
        EngineError: the judge is not there, or fails again and again.
    """
    prompt = Prompt(config.judge.prompt, "comparison", ("question", "response_a", "response_b"))
    dropped: list[Dropped] = []
    candidates = list(_candidates(config, responses, dropped))
    compared: list[Votes] = []
    sure: list[tuple[Pair, Votes]] = []
    failed = 0
    for pair, answers in zip(candidates, judge.on(_queries(config, prompt, pair) for pair in candidates), strict=True):
        verdicts = [answer.verdict for answer in answers if answer is not None]
        failed += len(answers) - len(verdicts)
        if len(verdicts) < len(answers):  # what is left would weigh one order more than the other
            dropped.append(_dropped(pair, "judge failed", len(answers) - len(verdicts)))
            continue
        compared.append(votes := Votes(tuple(verdicts)))
        if abs(votes.mean) > config.margin:
            sure.append((pair, votes))
        else:
            dropped.append(_dropped(pair, "margin", votes.scores))
    rows = [pair.row(votes) for pair, votes in sure]
    sizes = [(row["chosen_length"], row["rejected_length"]) for row in rows]
    tolerance = config.length_tolerance
    kept = set(range(len(rows)) if tolerance is None else lengths.balanced(sizes, tolerance))
    dropped += [
        _dropped(pair, "length balance", sizes[number]) for number, (pair, _) in enumerate(sure) if number not in kept
    ]
    figures = {
        "pairs": {"asked": len(candidates), "compared": len(compared), "kept": len(kept)},
        "votes": {"asked": len(candidates) * config.votes, "failed": failed},
        **comparison.figures(compared),
        "mean_tokens": lengths.means([sizes[number] for number in sorted(kept)]),
        "mean_tokens_before_balance": lengths.means(sizes),
        "chosen_by_model": _wins([rows[number] for number in sorted(kept)]),
    }
    return [rows[number] for number in sorted(kept)], dropped, figures


def _candidates(config: PreferencesConfig, responses: Responses, dropped: list[Dropped]) -> Iterator[Pair]:
    """The pairs that are worth comparing: different in what the judge sees."""
    for asked, found in responses:
        every = [Pair(asked, *two) for two in itertools.combinations(found, 2)]
        same = [pair for pair in every if pair.first.part == pair.second.part]
        dropped += [_dropped(pair, "same text") for pair in same]
        different = [pair for pair in every if pair.first.part != pair.second.part]
        rng = random.Random(stream_seed("pairs", config.seed, asked.id))
        wanted = min(config.pairs_per_question or len(different), len(different))
        for pair in rng.sample(different, wanted):
            # Which response is the first must not follow from which model was sampled first.
            yield pair if rng.random() < 0.5 else Pair(asked, pair.second, pair.first)


def _queries(config: PreferencesConfig, prompt: Prompt, pair: Pair) -> list[Query]:
    shown = (pair.first.part, pair.second.part)
    asked = pair.question.metadata["text"]

    def messages(vote: int) -> list[dict[str, str]]:
        first, second = shown[::-1] if exchanged(vote) else shown
        return prompt.messages(question=asked, response_a=first, response_b=second)

    return [Query(messages(vote), stream_seed("vote", config.seed, pair.id, vote)) for vote in range(config.votes)]


def _dropped(pair: Pair, reason: str, detail: Any = None) -> Dropped:
    return {
        "reason": reason,
        "detail": detail,
        "question_id": pair.question.id,
        "first": pair.first.text,
        "second": pair.second.text,
    }


def _wins(rows: Sequence[Row]) -> dict[str, int]:
    """How many of the kept pairs, between different models, each model wins."""
    between = [row for row in rows if row["chosen_model"] != row["rejected_model"]]
    return dict(sorted(Counter(row["chosen_model"] for row in between).items()))
