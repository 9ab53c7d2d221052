"""The example with a Python tool, over a model that was made to call it: from the run file to weights and report."""

import json
from pathlib import Path

import pytest

from tests.end_to_end import runs
from tests.end_to_end.runs import Command, checkpoint, rows
from tests.rollout.calling_model import write_model

EXAMPLE = runs.ROOT / "examples/tools/python.toml"
REPLY = "\n<tool_response>42</tool_response>\n"
PYTHON = {"begin": "<tool_call>", "end": "</tool_call>", "result": REPLY.replace("42", "{output}")}

pytestmark = pytest.mark.timeout(2000)


@pytest.mark.parametrize("ahead", [False, True], ids=["in turns", "ahead"])
def test_the_example_learns_from_conversations(tmp_path: Path, ahead: bool) -> None:
    output = tmp_path / "run"
    settings = {
        "output": output, "model.path": write_model(tmp_path / "model"), "questions": 4, "group_size": 4,
        "steps": 2, "evaluation.questions": 4, "logprob_bound": 1e-4, "checkpoint.every": 1,
        "report.tensorboard": "false", "rollout.port": runs.free_port(), "rollout.kv_cache_gib": 0.1,
        "rollout.start_timeout": 600, "rewards.digits.type": "tests.end_to_end.components:Digits",
        **{f"conversation.tools.python.{key}": json.dumps(text) for key, text in PYTHON.items()},
    }  # fmt: skip
    if ahead:
        settings |= {"rollout.dispatch": "continuous", "rollout.max_staleness": 1, "steps": 3}
    run_file = tmp_path / "rl.toml"
    run_file.write_text(EXAMPLE.read_text())
    with Command("rl", run_file, *(f"--{key}={value}" for key, value in settings.items())) as command:
        assert command.end(900) == 0, command.message()
    steps = rows(output)
    assert len(steps) == settings["steps"]
    assert all(step["tool_calls"] > 0.2 for step in steps), "a reply to every fifth response at least"
    assert all(step["grad_norm"] > 1e-4 for step in steps)
    assert max(step.get("logprob_difference_max", 0.0) for step in steps) < 1e-4
    assert checkpoint(output, len(steps))()
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    trained = [response for row in samples if row["tag"] == "train" for response in row["responses"]]
    for response in trained:
        replied = [piece for piece, said in zip(*_columns(response), strict=True) if said is None]
        assert bool(replied) == ("</tool_response>" in response["text"] or "is wrong" in response["text"])
        assert response["tokens"] == len(response["pieces"]) - len(replied)
    heldout = [response["text"] for row in samples if row["tag"] == "before" for response in row["responses"]]
    assert any(REPLY in text for text in heldout)


def _columns(response: dict[str, list[object]]) -> tuple[list[object], list[object]]:
    return response["pieces"], response["engine_logprobs"]
