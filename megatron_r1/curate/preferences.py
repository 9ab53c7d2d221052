"""`megatron-r1 preferences`: a judge compares, or labels, the responses of models.

Pairs are for a pairwise (Bradley-Terry) reward model and for DPO, labels for a pointwise one (DeepSeek-R1, arXiv
2501.12948 v2: 66,000 pairs for helpfulness, 106,000 labelled responses for safety).
"""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from megatron_r1.config.preferences import PreferencesConfig
from megatron_r1.curate.comparison import Comparison
from megatron_r1.curate.labels import Safety, label
from megatron_r1.curate.pairs import compare
from megatron_r1.curate.responses import Responses
from megatron_r1.curate.verdicts import Verdicts
from megatron_r1.data.files import write_lines
from megatron_r1.errors import DataError
from megatron_r1.report.summary import write_summary
from megatron_r1.rollout.sampling import OpenEngine, open_fleet

PAIRS, LABELS, DROPPED = "pairs.jsonl", "labels.jsonl", "dropped.jsonl"


def run(config: PreferencesConfig, open_engine: OpenEngine = open_fleet) -> dict[str, Any]:
    """Write `pairs.jsonl` or `labels.jsonl`; killed and started again, go on with what has not been judged.

    Returns:
        Prompts, responses, and what became of them; the judge's failures, verdicts and bias.

    Raises:
        ConfigError: a task, a prompt or an endpoint that cannot be used.
        DataError: a model or data set that cannot be read; nothing is left.
        EngineError: engines or judge do not start or die.
    """
    responses = Responses(config, open_engine)
    if config.kind == "pairs":
        with Verdicts(config.judge, Comparison, config.output) as pair_judge:
            rows, dropped, figures = compare(config, responses, pair_judge)
            counters = dict(pair_judge.endpoint.counters)
    else:
        with Verdicts(config.judge, Safety, config.output) as label_judge:
            rows, dropped, figures = label(config, responses, label_judge)
            counters = dict(label_judge.endpoint.counters)
    write_lines(config.output / DROPPED, [*responses.dropped, *dropped])
    reasons = dict(sorted(Counter(row["reason"] for row in dropped).items()))
    if not rows:
        raise DataError(
            f"no {config.kind} are left of {responses.sampled} responses to {len(responses.questions)} prompts "
            f"(responses: {responses.figures()['dropped'] or 'none dropped'}; then: {reasons or 'none dropped'}); "
            f"{config.output / DROPPED} shows each"
        )
    write_lines(config.output / (PAIRS if config.kind == "pairs" else LABELS), rows)
    summary = {
        "kind": config.kind,
        "part": config.judged,
        "judge": {"model": config.judge.model, "failures": counters},
        "questions": len(responses.questions),
        "responses": responses.figures(),
        "dropped": reasons,
        **figures,
    }
    _warn(rows, summary)
    Console(stderr=True).print_json(json.dumps(summary))
    return write_summary(config.output, summary)


def _warn(rows: Sequence[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Say at once what makes the data useless, or nearly."""
    console = Console(stderr=True)
    if summary["kind"] == "labels" and len({row["label"] for row in rows}) == 1:
        console.print("warning: all labels are the same, so there is nothing to learn from them", style="yellow")
    if summary["kind"] == "pairs" and (summary["position_bias"]["flip_rate"] or 0) > 0.5:
        console.print("warning: for most pairs the judge names whichever response stands in one place", style="yellow")
