"""Tables laid over each other; references and their real paths."""

import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1.config.overlay import merge
from megatron_r1.errors import ConfigError
from megatron_r1.recipe.tree import generalize, reference, resolve, texts

OUTPUT = Path("/runs/tiny")
WORDS = st.text("@/." + string.ascii_lowercase, max_size=12).filter(lambda text: ".." not in text and "//" not in text)
TREES = st.recursive(
    WORDS | st.integers() | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc"), inner, max_size=3),
    max_leaves=8,
)


def test_merge_is_deep_and_leaves_both_alone() -> None:
    under = {"optim": {"lr": 1, "clip": 2}, "steps": 3, "list": [1, 2]}
    over = {"optim": {"lr": 5}, "list": [3], "new": {"key": 1}}
    assert merge(under, over) == {"optim": {"lr": 5, "clip": 2}, "steps": 3, "list": [3], "new": {"key": 1}}
    assert under == {"optim": {"lr": 1, "clip": 2}, "steps": 3, "list": [1, 2]}
    assert over == {"optim": {"lr": 5}, "list": [3], "new": {"key": 1}}


@pytest.mark.parametrize(
    ("over", "merged"),
    [
        ({"type": "math", "source": "x"}, {"type": "math", "source": "x"}),
        ({"type": "gym", "seed": 1}, {"type": "gym", "dataset": "sums", "seed": 1}),
        ({"seed": 1}, {"type": "gym", "dataset": "sums", "seed": 1}),
    ],
)
def test_another_type_replaces_the_table(over: dict[str, Any], merged: dict[str, Any]) -> None:
    assert merge({"task": {"type": "gym", "dataset": "sums"}}, {"task": over}) == {"task": merged}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("@base/hf", ("base", "hf")),
        ("@base", ("base", "")),
        ("@base/", ("base", "")),
        ("@a/b/c.jsonl", ("a", "b/c.jsonl")),
        ("@@base", None),
        ("mail@base/hf", None),
        ("", None),
    ],
)
def test_reference(text: str, named: tuple[str, str] | None) -> None:
    assert reference(text) == named


@pytest.mark.parametrize("text", ["@base/../other", "@base/a/../../x", "@base//etc/passwd"])
def test_a_reference_stays_inside_its_stage(text: str) -> None:
    with pytest.raises(ConfigError, match="leaves the folder"):
        reference(text)


def test_resolve_finds_references_everywhere() -> None:
    tree = {"a": "@base/hf", "b": [{"c": "@corpus/x.jsonl"}, "text", 3], "d": "@@literal"}
    assert resolve(tree, OUTPUT) == {
        "a": "/runs/tiny/base/hf",
        "b": [{"c": "/runs/tiny/corpus/x.jsonl"}, "text", 3],
        "d": "@literal",
    }
    assert list(texts(tree)) == ["@base/hf", "@corpus/x.jsonl", "text", "@@literal"]


@given(TREES)
def test_a_general_tree_resolves_to_itself(tree: Any) -> None:
    assert resolve(generalize(tree, OUTPUT), OUTPUT) == tree


def test_paths_below_the_output_become_references() -> None:
    assert generalize(["/runs/tiny/base/hf", "/runs/tinyer/base"], OUTPUT) == ["@base/hf", "/runs/tinyer/base"]
