"""A run that is killed, and one with real engines."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from megatron_r1.config.collect import CollectConfig
from megatron_r1.config.load import validate
from megatron_r1.curate.collect import run
from tests.curate.speaking import Opener
from tests.curate.test_collect import CHAT, adds_up, collected, rewriting, source, tree
from tests.evaluate.run_files import lines
from tests.rollout.tiny_model import free_port, write_model

ROOT = Path(__file__).parents[2]
FILES = ("chats.jsonl", "dropped.jsonl", "summary.json")


def contents(output: Path) -> list[str]:
    return [(output / name).read_text().replace(str(output), "") for name in FILES]


@pytest.mark.parametrize("batches", [1, 4])
def test_a_killed_run_goes_on_and_ends_the_same(tmp_path: Path, sums: Path, models: Path, batches: int) -> None:
    """Three batches are sampled; then come those of the rewriting."""
    rewrite = rewriting(tmp_path, batch=10)
    section = source(sums, prompt_template="r1_chat", response=CHAT, rewrite=rewrite)
    whole = Opener()
    undisturbed = collected(tree(models, tmp_path / "whole", {"zero": section}), whole)
    assert len(whole.drawn) > 5
    trees = tree(models, tmp_path / "out", {"zero": section})
    file = tmp_path / "run.toml"
    file.write_text(tomli_w.dumps(trees))
    command = [sys.executable, "-m", "tests.curate.speaking", str(file), str(batches)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not any((tmp_path / "out" / name).exists() for name in FILES)
    opener = Opener()
    assert collected(trees, opener) == undisturbed
    adds_up(undisturbed, tmp_path / "out")
    assert len(opener.drawn) == len(whole.drawn) - batches
    assert opener.opened == (["zero", "writer"] if batches < 3 else ["writer"])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_other_filters_sample_nothing_again(tmp_path: Path, sums: Path, models: Path) -> None:
    strict = collected(tree(models, tmp_path / "out", {"zero": source(sums)}))
    opener = Opener()
    loose: dict[str, Any] = tree(models, tmp_path / "out", {"zero": source(sums)}, filters={"truncated": False})
    summary = collected(loose, opener)
    assert not opener.opened
    assert summary["rows"] > strict["rows"]
    assert set(summary["total"]["dropped"]) == {"wrong", "duplicate"}
    assert len(lines(tmp_path / "out/chats.jsonl")) == summary["rows"]


def test_vllm_samples_and_rewrites(tmp_path: Path, sums: Path, tokenizer: Path) -> None:
    """One real engine serves a source and the rewriting of it; a model with random weights, judged by parity."""
    folder = write_model(tmp_path / "model", seed=1)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    rollout = {"max_model_len": 256, "max_tokens": 30, "max_num_seqs": 64, "kv_cache_gib": 0.1, "threads": 1}
    rollout |= {"port": free_port(), "start_timeout": 500.0}
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("{question}")
    even = {"even": {"type": "tests.evaluate.scripted:Even"}}
    rewrite = {"model": "tiny", "prompt": str(prompt), "attempts": 4, "max_tokens": 10}
    section = source(sums, model="tiny", rewards=even, samples=4) | {"rewrite": rewrite}
    section["filters"] = {"truncated": False, "broken_characters": False}
    tiny = {"path": str(folder), "dtype": "float32", "rollout": rollout}
    trees = {"output": str(tmp_path / "out"), "models": {"tiny": tiny}, "sources": {"tiny": section}}
    summary = run(validate(CollectConfig, trees, where="the test"))
    adds_up(summary, tmp_path / "out")
    assert 0 < summary["rows"] < summary["total"]["sampled"] == 48
    for row in lines(tmp_path / "out/chats.jsonl"):
        assert len(row["response"]) % 2 == 0
        assert row["response"] != row["provenance"]["rewritten"]["from"]
    assert (tmp_path / "out/engines/tiny/logs/engine-0.log").exists()
