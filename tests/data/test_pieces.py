"""However a file is cut, its pieces hold each line once and in order."""

import json
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from megatron_r1.data.pieces import Piece, _cut, documents

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30), min_size=1, max_size=20)


@settings(max_examples=200, deadline=None)
@given(texts=TEXTS, size=st.integers(1, 200), end=st.sampled_from(["", "\n", "\r\n"]), ascii_only=st.booleans())
def test_lines(
    texts: list[str], size: int, end: str, ascii_only: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=ascii_only) for text in texts]
    path.write_bytes(((end or "\n").join(lines) + end).encode())
    pieces = list(_cut(path, size))
    assert sum(piece.nbytes for piece in pieces) == path.stat().st_size
    assert max(piece.nbytes for piece in pieces) <= size
    assert [text for piece in pieces for text in documents(piece, "text")] == texts


@pytest.mark.parametrize("size", [1, 3000, 1 << 20])
def test_row_groups(size: int, tmp_path: Path) -> None:
    texts = [f"document {number}" for number in range(1000)]
    table = pyarrow.table(
        {"text": pyarrow.array(texts, pyarrow.large_string()), "length": [len(text) for text in texts]}
    )
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=70)
    pieces: list[Piece] = list(_cut(tmp_path / "a.parquet", size))
    assert (len(pieces) == 15, len(pieces) == 1) == (size == 1, size == 1 << 20)
    assert [text for piece in pieces for text in documents(piece, "text")] == texts
