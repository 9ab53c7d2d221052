import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tomli_w

from megatron_r1.cli import main
from megatron_r1.config.load import validate
from megatron_r1.data.decontaminate import DecontaminateConfig, run
from megatron_r1.data.tasks.base import Problem, Task
from megatron_r1.data.tasks.finite import FiniteTask
from megatron_r1.errors import ConfigError, DataError

RUN = "the quick brown fox jumps over the lazy old dog"
"""Ten words."""
CLEAN = "an entirely different question about prime numbers between one and twenty"
ROWS = [
    {"id": 0, "problem": CLEAN, "solution": "There are eight."},
    {"id": 1, "problem": f"Translate: “{RUN.upper()}”, please!", "solution": "..."},
    {"id": 2, "problem": RUN.replace("lazy", "sleepy"), "solution": None},
    {"id": 3, "problem": "什么是质数？", "solution": f"As they say, {RUN.replace(' ', '  ')}."},
    {"id": 4, "problem": "What is 2 + 2", "solution": "4"},
    {"id": 5, "problem": "So: what is 2 + 2?", "solution": "4"},
]


class Endless(Task):
    """As many problems as are asked for."""

    name = "endless"

    def problem(self, seed: int, index: int) -> Problem:
        return Problem(f"What comes after {RUN} number {index}?", str(index + 1))


class Quotations(FiniteTask):
    """Three problems, one of which quotes."""

    name = "quotations"
    size = 3

    def row(self, number: int) -> Problem:
        return Problem(f"Who said that {RUN}?" if number == 2 else "Who is this?", "")


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def tree(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run over ROWS against two evaluation sets, one of them a Parquet file."""
    quotes = jsonl(folder / "quotes.jsonl", [{"question": "Nothing of this is shared."}, {"question": f"Read: {RUN}!"}])
    pyarrow.parquet.write_table(pyarrow.table({"problem": ["what is 2+2?", "?"]}), folder / "sums.parquet")
    evaluation = {
        "quotes": {"data": {"source": quotes}, "text": ["question"]},
        "sums": {"data": {"source": str(folder / "sums.parquet")}},
    }
    data = {"source": jsonl(folder / "rows.jsonl", ROWS)}
    return {"output": str(folder / "out"), "data": data, "evaluation": evaluation} | changes


def config(folder: Path, **changes: Any) -> DecontaminateConfig:
    return validate(DecontaminateConfig, tree(folder, **changes), where="the test")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_shared_words_drop_a_row_and_are_named(tmp_path: Path) -> None:
    summary = run(config(tmp_path, text=["problem", "solution"]))
    assert [row["id"] for row in lines(tmp_path / "out/kept.jsonl")] == [0, 2, 5]
    assert lines(tmp_path / "out/kept.jsonl")[0] == ROWS[0]
    dropped = lines(tmp_path / "out/dropped.jsonl")
    assert [row["row"] for row in dropped] == [ROWS[1], ROWS[3], ROWS[4]]
    assert dropped[0]["place"].endswith("rows.jsonl, line 2")
    assert [row["overlap"] for row in dropped] == [
        [{"column": "problem", "evaluation": "quotes", "evaluation_row": 1, "shared": RUN}],
        [{"column": "solution", "evaluation": "quotes", "evaluation_row": 1, "shared": RUN}],
        [{"column": "problem", "evaluation": "sums", "evaluation_row": 0, "shared": "what is 2 2"}],
    ]
    assert summary == json.loads((tmp_path / "out/summary.json").read_text())
    assert summary == {
        "rows": 6,
        "kept": 3,
        "dropped": 3,
        "dropped_share": 0.5,
        "ngram": 10,
        "evaluation": {
            "quotes": {"rows": 2, "rows_without_words": 0, "dropped": 2},
            "sums": {"rows": 2, "rows_without_words": 1, "dropped": 1},
        },
        "commonest": {RUN: 2},
    }


def test_only_the_named_columns_are_compared(tmp_path: Path) -> None:
    run(config(tmp_path))
    assert [row["row"]["id"] for row in lines(tmp_path / "out/dropped.jsonl")] == [1, 4]


def test_a_shorter_ngram_drops_more(tmp_path: Path) -> None:
    run(config(tmp_path, ngram=7))
    assert [row["row"]["id"] for row in lines(tmp_path / "out/dropped.jsonl")] == [1, 2, 4]


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    same = {"same": {"data": {"source": str(tmp_path / "rows.jsonl")}}}
    with pytest.raises(DataError, match=r"all 6 rows of .*rows\.jsonl share words.*dropped\.jsonl"):
        run(config(tmp_path, evaluation=same))
    assert not (tmp_path / "out/summary.json").exists()


def test_a_task_is_an_evaluation_set(tmp_path: Path) -> None:
    task = {"type": "tests.data.test_decontaminate:Quotations"}
    run(config(tmp_path, evaluation={"quotations": {"task": task}}))
    [dropped] = lines(tmp_path / "out/dropped.jsonl")
    [overlap] = dropped["overlap"]
    assert (dropped["row"]["id"], overlap["evaluation"], overlap["evaluation_row"]) == (1, "quotations", 2)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.toml"
    file.write_text(tomli_w.dumps(tree(tmp_path)))
    assert main(["data", "decontaminate", str(file), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["dropped"] == 2
    assert "2 of 6 rows dropped (33.33 %)" in said.err
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert main(["data", "decontaminate", str(file)]) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == first


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"text": ["problm"]}, DataError, "no column 'problm', did you mean 'problem'"),
        ({"text": ["id"]}, DataError, r"line 1: column 'id' holds a int; a text was expected"),
        ({"evaluation": {}}, ConfigError, "evaluation"),
        ({"evaluation": {"a": {}}}, ConfigError, "either `data` or `task`"),
        (
            {"evaluation": {"a": {"task": {"type": "tests.data.test_decontaminate:Endless"}}}},
            ConfigError,
            "without end",
        ),
        ({"text": []}, ConfigError, "text"),
    ],
)
def test_bad_configs_leave_nothing_behind(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run(config(tmp_path, **changes))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_an_evaluation_set_without_words_is_refused(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "empty.jsonl", [{"problem": "?"}])
    with pytest.raises(DataError, match="'symbols' has no text with words"):
        run(config(tmp_path, evaluation={"symbols": {"data": {"source": source}}}))
