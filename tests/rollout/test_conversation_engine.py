"""Conversations with real engines and a model that calls: what it says, who has said it, and under which weights."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from megatron_r1.config.asynchrony import WeightsChange
from megatron_r1.config.conversation import ConversationSection
from megatron_r1.config.evaluation import EvaluateConfig
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.evaluate import benchmark
from megatron_r1.rollout.conversation import Conversation
from megatron_r1.rollout.fleet import Fleet
from megatron_r1.rollout.flow import Newer
from megatron_r1.rollout.tools.base import Tool
from megatron_r1.rollout.tools.python import Python
from megatron_r1.types import Question, Sample
from megatron_r1.weight_sync.named_tensors import NamedTensors
from megatron_r1.weight_sync.shared_memory import SharedMemorySync
from tests.rollout.calling_model import write_model
from tests.rollout.test_flow import Told, flowing
from tests.rollout.tiny_model import free_port, rollout_section

TAGGED = {"begin": "<tool_call>", "end": "</tool_call>", "result": "\n<tool_response>{output}</tool_response>\n"}
REPLY = "\n<tool_response>42</tool_response>\n"
QUESTIONS = [Question(f"q{n}", "sums", f"User: 6*7, {'quick' * n}? Assistant:", "42") for n in range(4)]
N = 4
pytestmark = pytest.mark.timeout(1200)  # an engine starts in one of them


class Waiting(Tool):
    """Says 42 when it is let."""

    called, let = threading.Event(), threading.Event()

    def run(self, call: str, question: Question) -> str:
        self.called.set()
        assert self.let.wait(120)
        return "42"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two that call the same tool with other log-probabilities."""
    folder = tmp_path_factory.mktemp("calling")
    return write_model(folder / "first", seed=0), write_model(folder / "second", seed=1)


@pytest.fixture(scope="module")
def tokenizer(models: tuple[Path, Path]) -> Tokenizer:
    return Tokenizer.load(models[0])


@pytest.fixture(scope="module")
def fleet(models: tuple[Path, Path], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    tools = {"python": {"type": "python", **TAGGED}, "waiting": {"type": f"{__name__}:Waiting", **TAGGED}}
    conversation = Conversation(ConversationSection(tools=tools), tokenizer)
    folder, section = (
        tmp_path_factory.mktemp("run"),
        rollout_section(free_port(), max_model_len=256, max_tokens=160, start_timeout=600.0),
    )
    with Fleet(section, models[0], folder, "float32", tokenizer.decode, conversation=conversation) as fleet:
        yield fleet


def asked(tool: str, question: Question = QUESTIONS[0]) -> Question:
    return replace(question, tools=(tool,))


def sampled(fleet: Fleet, tokenizer: Tokenizer, seed: int = 1, tool: str = "python") -> list[tuple[Question, Sample]]:
    asking = [asked(tool, one) for one in QUESTIONS]
    prompts = [tokenizer.encode_prompt(one.prompt) for one in asking]
    answered = dict(fleet.stream(prompts, n=N, seed=seed, questions=asking))
    return [(question, sample) for number, question in enumerate(asking) for sample in answered[number]]


def reference(model: Path, tokens: list[int], first: int) -> torch.Tensor:
    """transformers' log-probabilities of the tokens from `first` on."""
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)(torch.tensor([tokens])).logits[0]
    return logits[first - 1 : -1].log_softmax(-1).gather(1, torch.tensor(tokens[first:])[:, None])[:, 0]


@contextmanager
def dispatching(fleet: Fleet, dispatch: str) -> Iterator[None]:
    fleet.feed(dispatch)  # type: ignore[arg-type]
    try:
        yield
    finally:
        fleet.feed("batch")


def check(model: Path, tokenizer: Tokenizer, answered: list[tuple[Question, Sample]]) -> int:
    """Every sample is a conversation, or none; how many are."""
    conversations = 0
    for question, sample in answered:
        prompt = tokenizer.encode_prompt(question.prompt)
        said = reference(model, prompt + sample.tokens, len(prompt))
        if sample.mask:
            said = said[torch.tensor(sample.mask)]
        torch.testing.assert_close(torch.tensor(sample.logprobs), said, atol=2e-5, rtol=0)
        if not sample.mask or sample.length == len(sample.tokens):
            continue
        conversations += 1
        replies = [t for t, mine in zip(sample.tokens, sample.mask, strict=True) if not mine]
        assert sample.tokens[-1] != replies[-1]
        assert sample.weight_spans[-1][1] == sample.length
        assert tokenizer.decode(replies).startswith("\n<tool_response>")
    return conversations


def test_a_batch_calls_python_and_repeats_bit_for_bit(
    fleet: Fleet, models: tuple[Path, Path], tokenizer: Tokenizer
) -> None:
    answered = sampled(fleet, tokenizer)
    assert check(models[0], tokenizer, answered) > len(answered) // 4
    right = "<think><tool_call>print(6*7)</tool_call>" + REPLY + "</think><answer>42</answer>"
    assert sum(sample.text == right for _, sample in answered) > len(answered) // 8
    assert len({str(sample.logprobs) for _, sample in answered}) > len(answered) // 4, "samples are all the same"
    assert [sample for _, sample in sampled(fleet, tokenizer)] == [sample for _, sample in answered]


def test_continuously_it_is_the_same_model(fleet: Fleet, models: tuple[Path, Path], tokenizer: Tokenizer) -> None:
    with dispatching(fleet, "continuous"):
        answered = sampled(fleet, tokenizer, seed=2)
    assert check(models[0], tokenizer, answered) > len(answered) // 4


@pytest.mark.parametrize("weights_change", ["in_flight", "at_group_borders"])
def test_new_weights_while_a_tool_works(
    fleet: Fleet, models: tuple[Path, Path], tokenizer: Tokenizer, tmp_path: Path, weights_change: WeightsChange
) -> None:
    """In flight the turns before it are of the old ones, those after it of the new; else all are of the old ones."""
    Waiting.called.clear()
    Waiting.let.clear()
    sync = SharedMemorySync(fleet, tmp_path)
    weights = [load_file(model / "model.safetensors") for model in models]
    first = fleet.version + 1
    sync.push(NamedTensors.of(weights[0]), version=first)
    prompt = tokenizer.encode_prompt(QUESTIONS[0].prompt)
    with dispatching(fleet, "continuous"), flowing(fleet, weights_change) as told:
        seed = calling_seed(told, prompt, first)
        told.flow.submit("waiting", prompt, [seed], first, question=asked("waiting"))
        assert Waiting.called.wait(120)
        sync.push(NamedTensors.of(weights[1]), version=first + 1)
        Waiting.let.set()
        told.until(lambda: "waiting" in told.complete and Newer(first + 1) in told.events)
    fleet._running.weights_change = "in_flight"
    [sample], turn = told.complete["waiting"], told.complete["waiting"][0].mask.index(False)
    said = torch.tensor(sample.logprobs)
    old, new = (reference(model, prompt + sample.tokens, len(prompt))[torch.tensor(sample.mask)] for model in models)
    assert sample.weight_version == first
    if weights_change == "at_group_borders":
        assert sample.weight_spans == [(first, sample.length)]
        torch.testing.assert_close(said, old, atol=2e-5, rtol=0)
    else:
        assert sample.weight_spans == [(first, turn), (first + 1, sample.length)]
        torch.testing.assert_close(said, torch.cat([old[:turn], new[turn:]]), atol=2e-5, rtol=0)


def calling_seed(told: Told, prompt: list[int], version: int) -> int:
    """One with which the model calls a tool."""
    for seed in range(100):
        told.flow.submit(f"{seed}", prompt, [seed], version, question=asked("python"))
        told.until(lambda key=f"{seed}": key in told.complete)  # type: ignore[misc]
        if told.complete[f"{seed}"][0].mask:
            return seed
    raise AssertionError("the model never calls")


def test_an_evaluation_has_conversations(fleet: Fleet, models: tuple[Path, Path], tmp_path: Path) -> None:
    source = tmp_path / "sums.jsonl"
    source.write_text('{"problem": "6 * 7 = ?", "answer": "42"}\n')
    rollout = fleet.section.model_dump() | {"temperature": 1.0, "top_p": 1.0}
    tree = {
        "output": tmp_path / "out", "model": {"path": models[0], "dtype": "float32"}, "rollout": rollout, "samples": 16,
        "conversation": {"tools": {"python": {"type": "python", **TAGGED}}},
        "tasks": {"sums": {
            "template": "r1_zero_short", "task": {"type": "math", "source": str(source)}, "tools": ["python"],
            "rewards": {"known": {"type": "tests.evaluate.scripted:Known"}},
        }},
    }  # fmt: skip
    config = EvaluateConfig.model_validate(tree)
    result = benchmark.run(config, lambda *_: nullcontext(fleet))["tasks"]["sums"]
    [row] = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    texts = [answer["text"] for answer in row["responses"]]
    assert any(REPLY in text and text.endswith("<answer>42</answer>") for text in texts)
    assert result["pass@1"] == sum(text.endswith("<answer>42</answer>") for text in texts) / 16
    replies = [answer for answer in row["responses"] if REPLY in answer["text"]]
    assert all(answer["tokens"] < len(answer["text"]) for answer in replies), "a token is a letter or a tag"
    without = EvaluateConfig.model_validate({**tree, "conversation": None, "tasks": _without_tools(tree["tasks"])})
    benchmark.run(without, lambda *_: nullcontext(fleet))
    assert REPLY not in (tmp_path / "out/samples.jsonl").read_text(), "answers of another run file"


def _without_tools(tasks: Any) -> dict[str, Any]:
    return {name: {key: value for key, value in task.items() if key != "tools"} for name, task in tasks.items()}


def test_the_python_tool_runs_in_the_sandbox(tmp_path: Path) -> None:
    python = Python(Python.Config.model_validate({"limits": {"wall_seconds": 1.0}}))
    python.prepare()
    secret = tmp_path / "secret"
    secret.write_text("x")
    try:
        assert python.run("\nfor n in range(2):\n    print(n)\n", QUESTIONS[0]) == "0\n1"
        assert python.run("6 * 7", QUESTIONS[0]) == "(nothing was printed)"
        failed = python.run("print(1)\nprint(1 / 0)", QUESTIONS[0])
        assert failed.startswith("1\n")
        assert failed.endswith("ZeroDivisionError: division by zero")
        assert "SyntaxError" in python.run("print(", QUESTIONS[0])
        assert python.run("while True: pass", QUESTIONS[0]) == "error: the program did not end within 1 s"
        assert "FileNotFoundError" in python.run(f"print(open({str(secret)!r}).read())", QUESTIONS[0])
    finally:
        python.close()
