"""The figures that a verb ends with: `summary.json`, and as text."""

import json
from pathlib import Path
from typing import Any

from megatron_r1.errors import DataError
from megatron_r1.report.journal import finite, replace_text

SUMMARY = "summary.json"


def write_summary(output: Path, figures: dict[str, Any]) -> dict[str, Any]:
    """Write `output/summary.json` in one piece and return what it holds (NaN and infinity become null)."""
    output.mkdir(parents=True, exist_ok=True)
    clean: dict[str, Any] = finite(figures)
    replace_text(output / SUMMARY, json.dumps(clean, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return clean


def read_summary(output: Path) -> dict[str, Any]:
    """`output/summary.json`, or an empty dict if the run has none yet.

    Raises:
        DataError: the file is not a JSON object.
    """
    path = output / SUMMARY
    if not path.exists():
        return {}
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON ({error}); remove it and run the verb again") from error
    if not isinstance(figures, dict):
        raise DataError(f"{path} holds a {type(figures).__name__}, not an object of figures")
    return figures


def flatten(figures: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested figures under dotted names, for a table."""
    flat: dict[str, Any] = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
