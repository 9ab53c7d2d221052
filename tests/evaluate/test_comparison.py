import json
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.errors import DataError
from megatron_r1.evaluate.comparison import gain, pass_rates
from megatron_r1.evaluate.estimators import difference


def evaluation(folder: Path, rows: list[tuple[str, str, float | None]]) -> Path:
    folder.mkdir()
    lines = [json.dumps({"task": task, "question_id": name, "pass_rate": rate}) for task, name, rate in rows]
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_the_questions_of_both_are_compared(tmp_path: Path) -> None:
    rows: list[Any] = [("sums", "a", 0.0), ("sums", "b", 0.5), ("sums", "only here", 1.0), ("chat", "c", None)]
    before = pass_rates(evaluation(tmp_path / "before", rows))
    assert before == {"sums": {"a": 0.0, "b": 0.5, "only here": 1.0}}
    found = gain(before["sums"], {"b": 1.0, "a": 1.0, "only there": 0.0})
    mean, low, high = difference([0.5, 0.0], [1.0, 1.0]) or (0.0, 0.0, 0.0)
    assert found == {"pass@1_gain": mean, "pass@1_gain_interval": [low, high], "questions_compared": 2}


def test_nothing_to_compare_with(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"samples\.jsonl.*output folder of a finished"):
        pass_rates(tmp_path / "nowhere")
    rl = tmp_path / "rl"
    rl.mkdir()
    for text in ('{"step": 0, "responses": []}', "[1]", "{"):
        (rl / "samples.jsonl").write_text(text + "\n")
        with pytest.raises(DataError, match=r"samples\.jsonl cannot be used.*output folder of a finished"):
            pass_rates(rl)
    with pytest.raises(DataError, match="no question in common"):
        gain({"a": 1.0}, {"b": 1.0})
