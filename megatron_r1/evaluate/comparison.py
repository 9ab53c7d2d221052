"""Is a model better than another? The same questions answered by both, compared one by one."""

import json
from pathlib import Path
from typing import Any

from megatron_r1.errors import DataError
from megatron_r1.evaluate.estimators import difference


def pass_rates(folder: Path) -> dict[str, dict[str, float]]:
    """Task -> id of a question -> share of right answers, from what `evaluate` wrote to `folder`.

    Raises:
        DataError: no finished evaluation is there.
    """
    path, rates = folder / "samples.jsonl", dict[str, dict[str, float]]()
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                if row["pass_rate"] is not None:
                    rates.setdefault(row["task"], {})[row["question_id"]] = row["pass_rate"]
    except (OSError, ValueError, LookupError, TypeError) as error:  # the last three: of another verb, such as `rl`
        raise DataError(
            f"compare_with: {path} cannot be used ({type(error).__name__}: {error}); it has to be of the output folder "
            "of a finished `megatron-r1 evaluate` over the same tasks"
        ) from error
    return rates


def gain(before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
    """Gain in pass@1 over the questions that both have, with its 95 % confidence interval.

    Raises:
        DataError: they have no question in common.
    """
    shared = [question for question in after if question in before]
    if not shared:
        raise DataError("compare_with: the two evaluations of a task have no question in common")
    found = difference([before[question] for question in shared], [after[question] for question in shared])
    if found is None:
        return {}
    mean, low, high = found
    return {"pass@1_gain": mean, "pass@1_gain_interval": [low, high], "questions_compared": len(shared)}
