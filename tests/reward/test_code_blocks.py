import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1.reward.code_blocks import blocks, last_block


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```python\nx\n```", "x\n"),
        ("a\n```python\nx\n```\nb\n```py\ny\nz\n```\nc", "y\nz\n"),
        ("```python\nx\n```\n```cpp\ny\n```", "x\n"),
        ("```\nx\n```", "x\n"),
        ("```Python3 title=a\nx\n```", "x\n"),
        ("~~~python\nx\n~~~", "x\n"),
        ("````python\n```\nx\n```\n````", "```\nx\n```\n"),
        ("  ```python\r\nx\r\n  ```\r\n", "x\r\n"),
        ("```python\n\n```", "\n"),
        ('```python\nx = """\n```python\n"""\n```', 'x = """\n```python\n"""\n'),
        ("```python\nx", None),
        ("```cpp\nx\n```", None),
        ("```pythonic\nx\n```", None),
        ("``python\nx\n``", None),
        ("text ```python\nx\n```", None),
        ("", None),
    ],
)
def test_last_block(text: str, expected: str | None) -> None:
    assert last_block(text, "python") == expected


def test_label_may_be_demanded() -> None:
    assert last_block("```python\nx\n```\n```\ny\n```", "python", unlabelled=False) == "x\n"
    assert last_block("```c++\nx\n```", "cpp", unlabelled=False) == "x\n"
    assert last_block("```rust\nx\n```", "rust", unlabelled=False) == "x\n"


@given(st.text(alphabet="`~py\n x", max_size=200))
def test_any_text(text: str) -> None:
    found = last_block(text, "python")
    assert found is None or (found.rstrip("\n") in text and found.endswith("\n"))


@pytest.mark.parametrize("text", ["```x\n" * 200_000, "```" + " " * 200_000 + "`", "~" * 200_000 + "`"])
def test_what_never_ends_takes_linear_time(text: str) -> None:
    start = time.perf_counter()
    assert len(list(blocks(text))) == 0
    assert time.perf_counter() - start < 10  # minutes, if each looked for its own end
