"""Ready rows, decontamination, limits and shares."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.collect import CollectConfig
from megatron_r1.config.load import validate
from megatron_r1.curate.collect import run
from megatron_r1.curate.mix import quotas
from megatron_r1.errors import DataError
from tests.curate.test_collect import adds_up
from tests.evaluate.run_files import lines

LONG = "how many apples has Anna got if she buys seven and then eats two of them"


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(folder: Path, name: str, count: int) -> dict[str, Any]:
    rows = [{"prompt": f"{name} {number}?", "response": f"I say {number}."} for number in range(count)]
    return {"kind": "rows", "data": {"source": written(folder / f"{name}.jsonl", rows)}}


def config(output: Path, tokenizer: Path, sources: dict[str, Any], **changes: Any) -> CollectConfig:
    tree = {"output": str(output), "tokenizer": str(tokenizer), "sources": sources, **changes}
    return validate(CollectConfig, tree, where="the test")


def test_rows_that_evaluation_sets_hold_are_dropped(tmp_path: Path, tokenizer: Path) -> None:
    rows = [
        {"prompt": f"Well, {LONG.upper()}?", "response": "Five."},
        {"prompt": "how many apples has Anna got?", "response": "Nobody knows."},
        {"prompt": "What?", "response": LONG},
    ]
    source: dict[str, Any] = {"kind": "rows", "data": {"source": written(tmp_path / "rows.jsonl", rows)}}
    evaluation = {"apples": {"data": {"source": written(tmp_path / "test.jsonl", [{"problem": LONG}])}}}
    for text, left in ((["question"], {1, 2}), (["question", "response"], {1})):
        output = tmp_path / str(len(text))
        settings = {"evaluation": evaluation, "text": text}
        summary = run(config(output, tokenizer, {"a": source}, decontaminate=settings))
        adds_up(summary, output)
        assert {row["question"] for row in lines(output / "chats.jsonl")} == {rows[n]["prompt"] for n in left}
        assert summary["total"]["dropped"] == {"contaminated": 3 - len(left)}
        first = lines(output / "dropped.jsonl")[0]
        assert first["detail"][0]["evaluation"] == "apples"
        assert len(first["detail"][0]["shared"].split()) == 10
    source["data"]["source"] = written(tmp_path / "all.jsonl", [*rows[:2], {"prompt": "Anna", "response": "apples"}])
    narrow = {"evaluation": evaluation, "ngram": 1}
    with pytest.raises(DataError, match=r"no row is left.*3 contaminated"):
        run(config(tmp_path / "none", tokenizer, {"a": source}, decontaminate=narrow))


def test_limits_and_shares_are_exact(tmp_path: Path, tokenizer: Path) -> None:
    sources = {name: pairs(tmp_path, name, count) for name, count in (("a", 40), ("b", 9), ("c", 30))}
    sources["c"] |= {"limit": 10, "domain": "other"}
    limited = run(config(tmp_path / "limits", tokenizer, sources))
    adds_up(limited, tmp_path / "limits")
    assert {name: counts["kept"] for name, counts in limited["sources"].items()} == {"a": 40, "b": 9, "c": 10}
    assert {name: counts["kept"] for name, counts in limited["domains"].items()} == {"general": 49, "other": 10}
    shares = {name: source | {"share": share} for (name, source), share in zip(sources.items(), (5, 2, 1), strict=True)}
    mixed = run(config(tmp_path / "shares", tokenizer, shares))
    adds_up(mixed, tmp_path / "shares")
    # b is the scarcest: 9 of 2/8, so a total of 36, of which a has 22.5 and c 4.5.
    assert {name: counts["kept"] for name, counts in mixed["sources"].items()} == {"a": 22, "b": 9, "c": 4}
    assert mixed["total"]["dropped"] == {"beyond limit or share": 18 + 0 + 26}


@pytest.mark.parametrize(
    ("available", "sizes"),
    [
        ({"a": 10, "b": 10, "c": 10}, (10, 4, 2)),
        ({"a": 0, "b": 10, "c": 10}, (0, 0, 0)),
        ({"a": 5, "b": 9, "c": 1}, (5, 2, 1)),
    ],
)
def test_quotas(tmp_path: Path, tokenizer: Path, available: dict[str, int], sizes: tuple[int, ...]) -> None:
    sources = {name: pairs(tmp_path, name, 1) | {"share": share} for name, share in (("a", 5), ("b", 2), ("c", 1))}
    found = quotas(config(tmp_path, tokenizer, sources), available)
    assert tuple(found.values()) == sizes
    assert all(found[name] <= count for name, count in available.items())


def test_the_seed_shuffles_and_draws(tmp_path: Path, tokenizer: Path) -> None:
    sources = {"a": pairs(tmp_path, "a", 40) | {"limit": 20}, "b": pairs(tmp_path, "b", 20)}
    found = {}
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        run(config(tmp_path / name, tokenizer, sources, seed=seed))
        found[name] = [row["question_id"] for row in lines(tmp_path / name / "chats.jsonl")]
    assert found["one"] == found["again"]
    assert set(found["one"]) != set(found["two"])
    assert Counter(name[0] for name in found["one"]) == Counter(a=20, b=20)
    assert 3 < Counter(name[0] for name in found["one"][:20])["a"] < 17


def test_conversations_and_ready_reasoning(tmp_path: Path, tokenizer: Path) -> None:
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "See you")]
    messages = [{"role": role, "content": content} for role, content in turns]
    talks = {"kind": "rows", "data": {"source": written(tmp_path / "talks.jsonl", [{"messages": messages}])}}
    thought = {"q": "1 + 1?", "think": "one, two", "response": "2", "answer": 2}
    none = {"q": "Hello!", "think": "", "response": "Hi.", "answer": None}
    data = {
        "source": written(tmp_path / "rows.jsonl", [thought, none]),
        "columns": {"prompt": "q", "reasoning": "think"},
    }
    ready = {"kind": "rows", "data": data, "prompt_template": "r1_chat", "domain": "math"}
    summary = run(config(tmp_path / "out", tokenizer, {"talks": talks, "ready": ready}))
    adds_up(summary, tmp_path / "out")
    rows = {row["question"]: row for row in lines(tmp_path / "out/chats.jsonl")}
    assert rows["Hi\nBye"]["messages"] == messages
    assert "prompt" not in rows["Hi\nBye"]
    assert summary["domains"]["general"]["mean_rounds"] == 2
    assert rows["1 + 1?"]["prompt"] == "<｜User｜>1 + 1?<｜Assistant｜><think>\n"
    assert rows["1 + 1?"]["response"] == "one, two\n</think>\n\n2"
    assert rows["Hello!"]["response"] == "\n</think>\n\nHi."
    assert (rows["1 + 1?"]["answer"], rows["Hello!"]["answer"]) == ("2", "")
    assert rows["Hello!"]["provenance"]["place"].endswith("rows.jsonl, line 2")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "has no column 'response'"),
        ({"prompt": "a", "response": " "}, "line 1: column 'response' holds ' '"),
        ({"messages": [{"role": "user", "content": "a"}]}, "ends with the assistant's"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "line 1: `messages` has to be a list"),
        ({"messages": "hello"}, "line 1: `messages` has to be a list"),
    ],
)
def test_rows_that_cannot_be_read(tmp_path: Path, tokenizer: Path, row: dict[str, Any], message: str) -> None:
    source = {"kind": "rows", "data": {"source": written(tmp_path / "rows.jsonl", [row])}}
    with pytest.raises(DataError, match=message):
        run(config(tmp_path / "out", tokenizer, {"a": source}))


def test_filters_of_ready_rows_are_their_own(tmp_path: Path, tokenizer: Path) -> None:
    source = pairs(tmp_path, "a", 3)
    with_default = config(tmp_path / "all", tokenizer, {"a": source}, filters={"well_formed": "tags"})
    assert run(with_default)["rows"] == 3
    strict = source | {"filters": {"length": {"max_tokens": 1}}}
    with pytest.raises(DataError, match="3 length"):
        run(config(tmp_path / "none", tokenizer, {"a": strict}))
