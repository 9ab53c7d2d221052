"""Labels of single responses: does the judge call it safe, and does it keep saying so?"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from megatron_r1.config.preferences import PreferencesConfig
from megatron_r1.curate.responses import Dropped, Response, Responses
from megatron_r1.curate.verdicts import Query, Verdicts
from megatron_r1.reward.chat_endpoint import Verdict
from megatron_r1.reward.prompt import Prompt
from megatron_r1.seeds import stream_seed
from megatron_r1.types import Question

Row = dict[str, Any]


class Safety(Verdict):
    """The judge's answer; it reasons before it decides."""

    analysis: str
    verdict: Literal["safe", "unsafe"]


def label(
    config: PreferencesConfig, responses: Responses, judge: Verdicts[Safety]
) -> tuple[list[Row], list[Dropped], dict[str, Any]]:
    """Labelled responses, what was dropped and why, and the figures.

    Raises:
        ConfigError: a prompt file that cannot be used, or an endpoint that does not accept what it is sent.
        EngineError: the judge is not there, or fails again and again.
    """
    prompt = Prompt(config.judge.prompt, "safety", ("question", "response"))
    candidates = [(asked, one) for asked, found in responses for one in found]
    rows: list[Row] = []
    dropped: list[Dropped] = []
    failed = 0
    answered = judge.on(_queries(config, prompt, asked, one) for asked, one in candidates)
    for (asked, one), answers in zip(candidates, answered, strict=True):
        verdicts: list[str] = [answer.verdict for answer in answers if answer is not None]
        failed += len(answers) - len(verdicts)
        safe = verdicts.count("safe") / len(answers)
        if len(verdicts) < len(answers):
            dropped.append(_dropped(asked, one, "judge failed", verdicts))
        elif max(safe, 1 - safe) < config.agreement:
            dropped.append(_dropped(asked, one, "agreement", verdicts))
        else:
            rows.append(_row(asked, one, safe, verdicts))
    figures = {
        "labels": {"asked": len(candidates), "kept": len(rows)} | _counts(rows),
        "votes": {"asked": len(candidates) * config.votes, "failed": failed},
    }
    return rows, dropped, figures


def _queries(config: PreferencesConfig, prompt: Prompt, asked: Question, one: Response) -> list[Query]:
    messages = prompt.messages(question=asked.metadata["text"], response=one.part)
    return [Query(messages, stream_seed("vote", config.seed, asked.id, one.id, vote)) for vote in range(config.votes)]


def _row(asked: Question, one: Response, safe: float, verdicts: Sequence[str]) -> Row:
    return {
        "prompt": asked.prompt,
        "response": one.text,
        "label": int(safe > 0.5),
        "question_id": asked.id,
        "question": asked.metadata["text"],
        "safe_share": safe,
        "votes": list(verdicts),
        "model": one.model,
        "length": one.length,
    }


def _dropped(asked: Question, one: Response, reason: str, verdicts: list[str]) -> Dropped:
    return {"reason": reason, "detail": verdicts, "question_id": asked.id, "response": one.text}


def _counts(rows: Sequence[Row]) -> dict[str, int]:
    counts = Counter(row["label"] for row in rows)
    return {"safe": counts[1], "unsafe": counts[0]}
