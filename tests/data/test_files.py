from pathlib import Path

import pytest

from megatron_r1.data.files import aside, documents
from megatron_r1.errors import DataError


def test_documents_keep_their_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": " a\\n\\u0000 "}\n{"text": "\u2028", "more": 1}\n', encoding="utf-8")
    assert list(documents(path)) == [" a\n\0 ", "\u2028"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"text": "a"}\n{"txt": "b"}\n', r"line 2: .*its keys are \['txt'\]"),
        ('{"text": "a"}\n\n', "line 2: not valid JSON"),
        ('{"text": ""}\n', "line 1: expected an object with a non-empty"),
        ('["text"]\n', "line 1: .*it is a list"),
        ('{"text": "\\ud800"}\n', "line 1: .*lone surrogate"),
    ],
)
def test_bad_lines_are_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        list(documents(path))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*nowhere\.jsonl: No such file"):
        list(documents(tmp_path / "nowhere.jsonl"))


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def interrupted() -> None:
        with aside(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


def test_what_a_killed_process_of_the_same_number_left_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for _ in range(2):
        with aside(path) as partial, partial.open("a") as out:
            out.write("whole")
            out.flush()
            (tmp_path / "killed").write_bytes(partial.read_bytes())
        (tmp_path / "killed").rename(partial)
    assert path.read_text() == "whole"
