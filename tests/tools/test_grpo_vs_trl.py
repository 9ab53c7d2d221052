"""Both sides of the comparison with TRL do the same work, and the clock of a turn. TRL itself is not needed."""

import argparse
import importlib
import json
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_r1.config import component
from megatron_r1.config.load import load
from megatron_r1.config.runs import RLConfig
from megatron_r1.data.questions import Questions
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.types import Group, Question, Sample

BENCH = Path(__file__).parents[2] / "tools/bench"
CHILD = """
import sys
sys.path[:0] = [sys.argv[2]]
from grpo_work import Turn
turn = Turn(sys.argv[1])
for step in range(9):
    turn.wait({"tokens": step})
"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("grpo_vs_trl")


@pytest.fixture
def sides(bench: ModuleType) -> ModuleType:
    return importlib.import_module("grpo_sides")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tokenizer that begins its prompts as SmolLM2's does."""
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), start=2)}
    fast = FastTokenizer(models.BPE(vocab={"<|im_start|>": 0, "<|im_end|>": 1, **letters}, merges=[]))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<|im_start|>", eos_token="<|im_end|>")
    made.save_pretrained(tmp_path / "model")
    (tmp_path / "model/config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "eos_token_id": 1}))
    return tmp_path / "model"


def work(bench: ModuleType, model: Path, folder: Path, **changes: Any) -> Any:
    longest = bench.write_prompts(folder / "prompts.jsonl", model, 12)
    plain = bench.Work(
        model=str(model), prompts=str(folder / "prompts.jsonl"), questions=4, group=8, updates=2,
        prompt_tokens=longest, answer_tokens=16, steps=3, threads=2,
    )  # fmt: skip
    return replace(plain, **changes)


def test_both_sides_read_the_same_prompts(bench: ModuleType, model: Path, tmp_path: Path) -> None:
    job = work(bench, model, tmp_path)
    rows = [json.loads(line) for line in Path(job.prompts).read_text().splitlines()]
    theirs = AutoTokenizer.from_pretrained(model)([row["text"] for row in rows])["input_ids"]
    ours = [Tokenizer.load(model).encode_prompt(row["bare"]) for row in rows]
    assert ours == theirs
    assert max(map(len, ours)) == job.prompt_tokens
    assert len({row["text"] for row in rows}) == 12


@pytest.mark.parametrize("updates", [1, 2, 4])
def test_both_sides_are_told_the_same(
    bench: ModuleType, sides: ModuleType, model: Path, tmp_path: Path, updates: int
) -> None:
    job = work(bench, model, tmp_path, updates=updates)
    (tmp_path / "ours.toml").write_text(sides.run_file(job, tmp_path, 9350))
    ours, theirs = load(tmp_path / "ours.toml", [], RLConfig), sides.trl_settings(job, {})
    micro, parts = theirs["per_device_train_batch_size"], theirs["gradient_accumulation_steps"]
    assert micro * theirs["steps_per_generation"] == ours.questions * ours.group_size == job.samples == 32
    assert theirs["steps_per_generation"] == parts * ours.minibatches
    assert theirs["num_generations"] == ours.group_size
    assert theirs["max_completion_length"] == ours.rollout.max_tokens
    assert theirs["max_steps"] == ours.steps * ours.minibatches
    assert (theirs["learning_rate"], theirs["weight_decay"]) == (ours.optim.lr, ours.optim.weight_decay)
    assert theirs["model_init_kwargs"]["dtype"] == ours.model.dtype
    assert theirs["beta"] == ours.loss["kl_coef"] == 0
    assert ours.rollout.threads == ours.parallel.threads == job.threads


def test_smaller_microbatches_are_more_of_them(
    bench: ModuleType, sides: ModuleType, model: Path, tmp_path: Path
) -> None:
    found = sides.trl_settings(work(bench, model, tmp_path), {"per_device_train_batch_size": 4})
    assert (found["gradient_accumulation_steps"], found["steps_per_generation"]) == (4, 8)


def test_the_task_waits_before_each_step_and_asks_in_order(
    bench: ModuleType, sides: ModuleType, model: Path, tmp_path: Path
) -> None:
    job = work(bench, model, tmp_path)
    (tmp_path / "ours.toml").write_text(sides.run_file(job, tmp_path, 9350))
    config = load(tmp_path / "ours.toml", [], RLConfig)
    heard: list[str] = []

    def listen(listener: socket.socket) -> None:
        turns = listener.accept()[0].makefile("rw")
        while line := turns.readline():
            heard.append(line)
            turns.write("go\n")
            turns.flush()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "ours.socket"))
        listener.listen(1)
        threading.Thread(target=listen, args=(listener,), daemon=True).start()
        questions = Questions(config.data, config.seed)
        asked = [one.prompt for step in range(2) for one in questions.take(step, job.questions)]
    rows = [json.loads(line)["bare"] for line in Path(job.prompts).read_text().splitlines()]
    assert asked == rows[:8]
    assert len(heard) == 2


def test_the_reward_is_the_same_rule(bench: ModuleType, sides: ModuleType, model: Path, tmp_path: Path) -> None:
    (tmp_path / "ours.toml").write_text(sides.run_file(work(bench, model, tmp_path), tmp_path, 9350))
    section = load(tmp_path / "ours.toml", [], RLConfig).rewards["letters"]
    reward = component.build("reward", {"type": section["type"]})
    samples = [Sample([], [], text, True, 0) for text in ("eel", "", "sun", "ee e")]
    scores = reward(Group(Question("1", "prompts", "", ""), [], samples))
    assert scores == [2 / 3, 0.0, 0.0, 0.75]
    assert scores == [importlib.import_module("grpo_work").letter_share(sample.text) for sample in samples]


def test_a_side_does_a_step_when_told(sides: ModuleType, tmp_path: Path) -> None:
    with sides.Side("child", [sys.executable, "-c", CHILD, "{address}", str(BENCH)], tmp_path, 1) as side:
        side.wait_until_ready()
        for step in (1, 2):
            assert side.step() > 0
            assert side.last["tokens"] == step
    assert side._process.returncode == 0  # heard enough, it has ended by itself


def test_a_side_that_dies_is_an_error(sides: ModuleType, tmp_path: Path) -> None:
    with (
        pytest.raises(SystemExit, match=r"child did not start(.|\n)*the reason"),
        sides.Side("child", [sys.executable, "-c", "raise SystemExit('the reason')"], tmp_path, 1) as side,
    ):
        side.wait_until_ready()


def test_phases_sum_to_the_step(bench: ModuleType) -> None:
    side = argparse.Namespace(steps=[{}, {"seconds": 4.0, "rollout": 1.0, "update": 2.0, "tokens": 9.0}])
    found = bench.phases(side)
    assert (found["rollout"], found["update"], found["other"], found["step"]) == (1.0, 2.0, 1.0, 4.0)


def test_without_trl_it_says_how_to_install_it(tmp_path: Path) -> None:
    code = (
        "import importlib.util, runpy, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'trl' else find(name, *rest)\n"
        f"sys.path[:0] = [{str(BENCH)!r}]; sys.argv = ['x', {str(tmp_path)!r}]\n"
        f"runpy.run_path({str(BENCH / 'grpo_vs_trl.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install --no-deps trl==" in done.stderr
