"""What the documentation shows is what the files hold."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXTENDING = (ROOT / "docs/extending.md").read_text()
SHOWN = re.findall(r"```(?:python|toml)\n(.*?)```", EXTENDING, re.DOTALL)


@pytest.mark.parametrize(
    ("file", "lines"),
    [("brevity.py", 20), ("leap_years.py", 20), ("leap_years.toml", 100)],
    ids=str,
)
def test_extending_shows_the_examples(file: str, lines: int) -> None:
    text = (ROOT / "examples/extending" / file).read_text()
    assert any(shown in text for shown in SHOWN), f"docs/extending.md does not show what {file} holds"
    assert len(text.splitlines()) <= lines


def test_the_page_of_tools_shows_the_example() -> None:
    shown = re.findall(r"```python\n(class .*?)```", (ROOT / "docs/tools.md").read_text(), re.DOTALL)
    assert shown
    assert all(text in (ROOT / "examples/tools/second_chance.py").read_text() for text in shown)


def test_every_example_file_of_the_page_exists() -> None:
    for target in re.findall(r"\]\(\.\./([^)]+)\)", EXTENDING):
        assert (ROOT / target).exists(), target
