"""The whole verb, on scripted engines."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from megatron_r1.cli import main
from megatron_r1.config.collect import CollectConfig
from megatron_r1.config.load import validate
from megatron_r1.config.sections import TaskSection
from megatron_r1.curate.collect import run
from megatron_r1.data.questions import heldout
from megatron_r1.data.templates import render
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.seeds import stream_seed
from tests.curate.speaking import FAULTS, Opener, total
from tests.evaluate.run_files import KNOWN, lines

GENERATED = {"type": "reasoning_gym", "dataset": "chain_sum", "options": {"min_terms": 2, "max_terms": 2}}
FILTERS = {
    "well_formed": "tags",
    "code_blocks": True,
    "long_paragraphs": {"max_characters": 300},
    "repetition": {},
    "mixed_language": {"language": "en"},
}
CHAT = "<think>\n{reasoning}\n</think>\n\n{summary}"
JUDGED_LATER = {"accuracy": {"type": "accuracy", "answer_in": "after_think"}}


def model(folder: Path) -> dict[str, Any]:
    rollout = {"max_model_len": 512, "max_tokens": 256, "kv_cache_gib": 0.1, "threads": 1}
    return {"path": str(folder), "dtype": "float32", "rollout": rollout}


def tree(models: Path, output: Path, sources: dict[str, Any], **changes: Any) -> dict[str, Any]:
    named = {name: model(models / name) for name in ("zero", "writer", "chatter")}
    return {
        "output": str(output),
        "models": named,
        "filters": FILTERS,
        "reward_workers": 1,
        "sources": sources,
    } | changes


def source(sums: Path, **changes: Any) -> dict[str, Any]:
    data = {"template": "r1_zero_short", "task": {"type": "math", "source": str(sums)}}
    return {"kind": "sample", "model": "zero", "data": data, "samples": 8, "rewards": KNOWN, "batch": 4} | changes


def rewriting(folder: Path, **changes: Any) -> dict[str, Any]:
    prompt = folder / "rewrite.txt"
    prompt.write_text("Write this again: {reasoning} {response}\nThe right answer is {reference}.\n{question}")
    own = {"code_blocks": True, "well_formed": "after_think"}
    return {"model": "writer", "prompt": str(prompt), "rewards": JUDGED_LATER, "filters": own} | changes


def collected(trees: dict[str, Any], opener: Opener | None = None) -> dict[str, Any]:
    return run(validate(CollectConfig, trees, where="the test"), opener or Opener())


def adds_up(summary: dict[str, Any], output: Path) -> None:
    """Every response is kept or dropped, once, in every table and in the files."""
    tables = [*summary["sources"].values(), *summary["domains"].values(), summary["total"]]
    for counts in tables:
        assert counts["sampled"] == counts["kept"] + sum(counts["dropped"].values())
    for part in ("sources", "domains"):
        assert sum(counts["sampled"] for counts in summary[part].values()) == summary["total"]["sampled"]
    rows, dropped = lines(output / "chats.jsonl"), lines(output / "dropped.jsonl")
    assert (len(rows), len(dropped)) == (summary["rows"], sum(summary["total"]["dropped"].values()))
    assert Counter(row["reason"] for row in dropped) == summary["total"]["dropped"]
    assert Counter(row["source"] for row in rows) == {k: v["kept"] for k, v in summary["sources"].items() if v["kept"]}
    assert summary == json.loads((output / "summary.json").read_text())


def test_rejection_sampling(tmp_path: Path, sums: Path, models: Path) -> None:
    opener = Opener()
    summary = collected(tree(models, tmp_path / "out", {"zero": source(sums, temperature=1.0)}), opener)
    adds_up(summary, tmp_path / "out")
    assert summary["total"]["sampled"] == 12 * 8
    assert opener.drawn == [("zero", 1.0, 1.0, 256)] * 3
    assert set(summary["total"]["dropped"]) == {*FAULTS, "wrong", "truncated", "duplicate"}
    for row in lines(tmp_path / "out/dropped.jsonl"):
        if row["reason"] in FAULTS:
            assert f"<think>{FAULTS[row['reason']]}</think>" in row["response"]
        elif row["reason"] == "wrong":
            assert not row["response"].endswith(f"<answer>{row['answer']}</answer>")
    rows = lines(tmp_path / "out/chats.jsonl")
    assert len({(row["question"], row["response"]) for row in rows}) == len(rows)
    for row in rows:
        assert row["prompt"] == render("r1_zero_short", row["question"])
        assert "My dice say" in row["response"]
        assert row["response"].endswith(f"<answer>{total(row['question'])}</answer>")
        assert (row["domain"], row["source"], row["answer"]) == ("math", "zero", str(total(row["question"])))
    wrong = summary["total"]["dropped"]["wrong"]
    assert summary["total"]["correct"] == 96 - wrong
    tokens = [len(Tokenizer.load(models / "zero").encode(row["response"])) + 1 for row in rows]
    assert summary["domains"]["math"]["mean_tokens"] == pytest.approx(sum(tokens) / len(tokens))
    assert summary["domains"]["math"]["mean_rounds"] == 1.0


def test_responses_end_before_a_stop_text(tmp_path: Path, sums: Path, models: Path) -> None:
    """Cut before its answer, a response is well formed no more; what was truncated behind the text is not any more."""
    stopped = source(sums, stop=["</answer>", " <answer>"], rewards={"even": {"type": "tests.evaluate.scripted:Even"}})
    summary = collected(tree(models, tmp_path / "out", {"zero": stopped}, filters={}))
    rows = lines(tmp_path / "out/chats.jsonl")
    assert rows
    assert all(row["response"].endswith("</think>") for row in rows)
    tokenizer = Tokenizer.load(models / "zero")
    assert all(row["provenance"]["tokens"] == len(tokenizer.encode(row["response"])) for row in rows)
    assert "truncated" not in summary["total"]["dropped"]


def test_the_provenance_of_a_row(tmp_path: Path, sums: Path, models: Path) -> None:
    collected(tree(models, tmp_path / "out", {"zero": source(sums, temperature=0.7, top_p=0.9)}, seed=3))
    journal = [answers for row in lines(tmp_path / "out/sampled/zero/scored.jsonl") for answers in row["answers"]]
    base = stream_seed("collect", 3, "zero")
    for row in lines(tmp_path / "out/chats.jsonl"):
        told = row["provenance"]
        position, number = int(row["question_id"].rpartition("-")[2]), told["sample"]
        assert row["question_id"] == f"zero/math-{position}"
        assert journal[position][number]["text"] == row["response"]
        assert told == {
            "model": str(models / "zero"),
            "sample": number,
            "seed": stream_seed(stream_seed("answers", base, position // 4), position % 4, number),
            "temperature": 0.7,
            "top_p": 0.9,
            "template": "r1_zero_short",
            "examples": [],
            "tokens": journal[position][number]["tokens"],
            "correct": True,
            "rewards": {"known": 1.0},
            "filters": ["truncated", "broken_characters", *["well_formed", "code_blocks", "long_paragraphs"],
                        "repetition", "mixed_language"],
        }  # fmt: skip


@pytest.mark.parametrize("choose", ["random", "shortest", "first"])
def test_at_most_so_many_to_a_question(tmp_path: Path, sums: Path, models: Path, choose: str) -> None:
    everything = tree(models, tmp_path / "all", {"zero": source(sums)})
    collected(everything)
    limited = tree(models, tmp_path / "out", {"zero": source(sums, max_per_question=1, choose=choose)})
    summary = collected(limited)
    adds_up(summary, tmp_path / "out")
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in lines(tmp_path / "all/chats.jsonl"):
        groups.setdefault(row["question_id"], []).append(row)
    chosen = {row["question_id"]: row for row in lines(tmp_path / "out/chats.jsonl")}
    assert chosen.keys() == groups.keys()
    assert summary["total"]["dropped"]["more than max_per_question"] == sum(len(rows) - 1 for rows in groups.values())
    key = {"shortest": "tokens", "first": "sample"}.get(choose)
    for name, rows in groups.items():
        assert chosen[name] in rows
        assert key is None or chosen[name]["provenance"][key] == min(row["provenance"][key] for row in rows)


def test_rewriting_is_judged_and_filtered_again(tmp_path: Path, sums: Path, models: Path) -> None:
    section = source(sums, prompt_template="r1_chat", response=CHAT, rewrite=rewriting(tmp_path))
    opener = Opener()
    summary = collected(tree(models, tmp_path / "out", {"zero": section}), opener)
    adds_up(summary, tmp_path / "out")
    assert opener.opened == ["zero", "writer"]
    assert {"rewrite: wrong", "rewrite: code_blocks", "rewrite: incomplete"} <= set(summary["total"]["dropped"])
    assert summary["total"]["rewritten"] == summary["rows"]
    asked = [prompt for prompt in opener.prompts if prompt.startswith("Write this again: ")]
    for row in lines(tmp_path / "out/chats.jsonl"):
        assert row["prompt"] == f"<｜User｜>{row['question']}<｜Assistant｜><think>\n"
        right = total(row["question"])
        assert row["response"] == f"I count on from the first number.\n</think>\n\nThe sum is \\boxed{{{right}}}."
        told = row["provenance"]["rewritten"]
        assert told["from"].endswith(f"<answer>{right}</answer>")
        assert told["rewards"] == {"accuracy": 1.0}
        assert (told["model"], told["attempt"]) == (str(models / "writer"), 0)
        reasoning = told["from"].partition("<think>")[2].partition("</think>")[0]
        prompt = f"Write this again: {reasoning} {told['from']}\nThe right answer is {right}.\n{row['question']}"
        assert prompt in asked


def test_more_attempts_save_more_rows(tmp_path: Path, sums: Path, models: Path) -> None:
    once = source(sums, prompt_template="r1_chat", response=CHAT, rewrite=rewriting(tmp_path))
    often = once | {"rewrite": rewriting(tmp_path, attempts=6)}
    fewer = collected(tree(models, tmp_path / "once", {"zero": once}))
    more = collected(tree(models, tmp_path / "often", {"zero": often}))
    adds_up(more, tmp_path / "often")
    assert more["rows"] > fewer["rows"]
    assert {row["provenance"]["rewritten"]["attempt"] for row in lines(tmp_path / "often/chats.jsonl")} > {0}


def test_the_three_ways_and_ready_rows_share_their_models(tmp_path: Path, sums: Path, models: Path) -> None:
    examples = tmp_path / "examples.jsonl"
    shown = [
        {"question": f"What is {a} + 1 ?", "response": f" <think>so</think> <answer>{a + 1}</answer>"}
        for a in (7, 8, 9)
    ]
    examples.write_text("".join(json.dumps(row) + "\n" for row in shown))
    chat = tmp_path / "chat.jsonl"
    rows = [{"prompt": f"Tell me about {word}", "response": f"{word} are nice"} for word in ("cats", "dogs", "cats")]
    chat.write_text("".join(json.dumps(row) + "\n" for row in rows))
    add = tmp_path / "think.txt"
    add.write_text("Why would one say so?\n{question}")
    task = {"task": GENERATED, "template": "r1_zero_short"}
    direct = {"task": GENERATED, "template": "Reflect, and verify your answer. {question}"}
    thinking = {"model": "chatter", "prompt": str(add), "share": 0.5, "form": "<think>{text}</think>\n{response}"}
    chats = {"prompt_template": "User: {question} Assistant:", "rewrite": thinking, "domain": "talk"}
    stored = {"prompt_template": "r1_zero_short", "questions": 5, "domain": "sums"}
    sources = {
        "few_shot": source(sums, data=task, examples={"source": str(examples), "count": 2}, **stored),
        "chat": {"kind": "rows", "data": {"source": str(chat)}, **chats},
        "direct": source(sums, data=direct, **stored),
    }
    opener = Opener()
    excluded = {"heldout": {"task": GENERATED, "questions": 30}}
    summary = collected(tree(models, tmp_path / "out", sources, exclude=excluded), opener)
    adds_up(summary, tmp_path / "out")
    assert opener.opened == ["zero", "chatter"]
    assert list(summary["domains"]) == ["talk", "sums"]
    assert summary["questions"]["few_shot"] == {"asked": 5, "no_room": 0}
    found: dict[str, list[dict[str, Any]]] = {}
    for row in lines(tmp_path / "out/chats.jsonl"):
        found.setdefault(row["source"], []).append(row)
    for row in found["few_shot"] + found["direct"]:
        assert row["prompt"] == f"User: {row['question']} Assistant:"
    worked = [f"User: {row['question']} Assistant:{row['response']}\n\n" for row in shown]
    few = [prompt for prompt in opener.prompts if worked[0][:-2] in prompt or worked[1][:-2] in prompt]
    assert len(few) == 5
    assert all(sum(example in prompt for example in worked) == 2 for prompt in few)
    assert sorted(found["few_shot"][0]["provenance"]["examples"]) in ([0, 1], [0, 2], [1, 2])
    assert summary["sources"]["chat"]["dropped"] == {"duplicate": 1}
    plain, reasoned = sorted(found["chat"], key=lambda row: "<think>" in row["response"])
    assert plain["response"] == f"{plain['question'].split()[-1]} are nice"
    thought = f"<think>They say: {reasoned['question']}</think>"
    assert reasoned["response"] == f"{thought}\n{reasoned['question'].split()[-1]} are nice"
    assert "rewritten" in reasoned["provenance"]
    assert "rewritten" not in plain["provenance"]


def test_excluded_questions_are_never_asked(tmp_path: Path, models: Path, sums: Path) -> None:
    few = {**GENERATED, "options": {"min_terms": 2, "max_terms": 2, "max_digits": 1}}  # 162 different ones
    section = source(sums, data={"task": few, "template": "r1_zero_short"}, questions=60, samples=1)
    reserved = {one.prompt for one in heldout(TaskSection(task=few, template="r1_zero_short"), 80)}
    free, careful = Opener(), Opener()
    collected(tree(models, tmp_path / "free", {"zero": section}), free)
    excluded = {"heldout": {"task": few, "questions": 80}}
    collected(tree(models, tmp_path / "careful", {"zero": section}, exclude=excluded), careful)
    assert len(set(free.prompts)) == len(set(careful.prompts)) == 60
    assert reserved & set(free.prompts)
    assert not reserved & set(careful.prompts)


def test_nothing_left_says_why(tmp_path: Path, sums: Path, models: Path) -> None:
    section = source(sums, min_reward={"known": 2.0})
    with pytest.raises(DataError, match=r"no row is left.*zero: 0 kept of 96, \d+ of them right; dropped: .*low known"):
        collected(tree(models, tmp_path / "out", {"zero": section}))
    assert len(lines(tmp_path / "out/dropped.jsonl")) == 96
    assert not (tmp_path / "out/summary.json").exists()
    assert not (tmp_path / "out/chats.jsonl").exists()


def test_a_judge_without_a_verdict_keeps_nothing(tmp_path: Path, sums: Path, models: Path) -> None:
    """`Known` gives no verdict where the reference is `?`, as a model judge that does not answer."""
    rows = [json.loads(line) for line in sums.read_text().splitlines()]
    sums.write_text("".join(json.dumps(row | {"answer": "?"} if n % 2 else row) + "\n" for n, row in enumerate(rows)))
    both = {**KNOWN, "even": {"type": "tests.evaluate.scripted:Even"}}
    summary = collected(tree(models, tmp_path / "out", {"zero": source(sums, rewards=both)}))
    assert summary["total"]["dropped"]["not judged"] == 6 * 8
    assert all(row["answer"] != "?" for row in lines(tmp_path / "out/chats.jsonl"))
    details = [row["detail"] for row in lines(tmp_path / "out/dropped.jsonl") if row["reason"] == "not judged"]
    assert details == [["known"]] * 48


def test_prompts_without_room_are_left_out(tmp_path: Path, sums: Path, models: Path) -> None:
    trees = tree(models, tmp_path / "out", {"zero": source(sums)})
    with sums.open("a") as file:
        file.write(json.dumps({"problem": "x" * 3000 + " 1 + 1", "answer": "2"}) + "\n")
    summary = collected(trees)
    adds_up(summary, tmp_path / "out")
    assert summary["questions"]["zero"] == {"asked": 12, "no_room": 1}


def test_the_command_prints_a_table(
    tmp_path: Path, sums: Path, models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    trees = tree(models, tmp_path / "out", {"zero": source(sums)})
    first = collected(trees)
    file = tmp_path / "run.toml"
    file.write_text(tomli_w.dumps(trees))
    capsys.readouterr()
    assert main(["collect", str(file), "--json"]) == 0  # all was sampled before: no engine starts
    said = capsys.readouterr()
    assert json.loads(said.out) == first
    assert "mixed_language" in said.err
    assert "domain" in said.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": {"format": {"type": "format"}}}, "no reward judges"),
        ({"response": "<think></think>"}, r"sources.zero.response has no placeholder"),
        ({"prompt_template": "r1_chatty"}, "template 'r1_chatty'"),
        ({"questions": 13}, "13 questions are asked for, but 'math' has 12"),
        ({"data": {"task": GENERATED}}, "makes problems without end"),
        ({"rewrite": {"model": "writer", "prompt": "none.txt"}}, "cannot read the prompt none.txt"),
        ({"rewrite": {"form": "5"}}, "form has no placeholder"),
    ],
)
def test_bad_run_files_start_no_engine(
    tmp_path: Path, sums: Path, models: Path, changes: dict[str, Any], message: str
) -> None:
    if "form" in changes.get("rewrite", {}):
        changes = {"rewrite": rewriting(tmp_path, **changes["rewrite"])}
    opener = Opener()
    with pytest.raises(ConfigError, match=message):
        collected(tree(models, tmp_path / "out", {"zero": source(sums, **changes)}), opener)
    assert not opener.opened
