"""Results of `evaluate` and `lm-eval` as a model card tells them."""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from megatron_r1.errors import DataError

_SCORES = re.compile(r"(pass|cons)@\d+")
"""What `evaluate` calls its scores; those of `lm-eval` have an error beside them."""


def read_results(path: Path) -> dict[str, Any]:
    """What `evaluate` or `lm-eval` wrote.

    Raises:
        DataError: something else.
    """
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(figures, dict) for figures in results["tasks"].values()):
            return results
        raise DataError(f"{path} is not what evaluate or lm-eval writes: `tasks` holds no tables")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not what evaluate or lm-eval writes ({type(error).__name__}: {error})") from error


def rows(results: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Task, metric, value, number of questions: shares in per cent, with their 95 % intervals."""
    return [
        (task, metric, _value(figures, metric), f"{figures.get('questions') or 0:,}")
        for task, figures in results["tasks"].items()
        for metric in scores(figures)
    ]


def scores(figures: dict[str, Any]) -> list[str]:
    """The scores among a task's figures: pass@k and cons@n of `evaluate`, what has an error beside it of `lm-eval`."""
    numbers = [key for key, value in figures.items() if isinstance(value, int | float)]
    return [key for key in numbers if _SCORES.fullmatch(key) or _error(key) in figures]


def _error(metric: str) -> str:
    name, comma, chosen = metric.partition(",")
    return f"{name}_error{comma}{chosen}"


def _value(figures: dict[str, Any], metric: str) -> str:
    interval, value = figures.get(f"{metric}_interval"), figures[metric]
    error = figures.get(_error(metric))
    if interval:
        return f"{100 * value:.1f} % ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"
    share = 0 <= value <= 1
    spread = "" if error is None else f" ± {1.96 * (100 * error if share else error):.1f}"
    return f"{100 * value:.1f}{spread} %" if share else f"{value:.1f}{spread}"


def hub_index(results: list[dict[str, Any]]) -> list[EvalResult]:
    """The results as the hub reads them from a card's metadata."""
    return [
        EvalResult("text-generation", task, task, metric, round(figures[metric], 6))
        for result in results
        for task, figures in result["tasks"].items()
        for metric in scores(figures)
    ]
