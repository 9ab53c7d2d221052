"""[conversation] of run files: what is refused, and what questions carry."""

from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.evaluation import EvaluateConfig
from megatron_r1.config.load import load
from megatron_r1.config.runs import RLConfig
from megatron_r1.data.questions import Questions
from megatron_r1.errors import ConfigError

AHEAD = ["--rollout.dispatch=continuous", "--rollout.max_staleness=1"]
PYTHON = ["--conversation.tools.python.type=python"]


def test_tools_are_completed_and_questions_name_theirs(rl_file: Path) -> None:
    config = load(rl_file, [*PYTHON, '--data.tools=["python"]', "--rollout.dispatch=continuous"], RLConfig)
    assert config.conversation is not None
    assert config.conversation.tools["python"]["sandbox"] == "bubblewrap"
    assert config.conversation.tools["python"]["end"] == "```"
    [question] = Questions(config.data, 0).take(0, 1)
    assert question.tools == ("python",)
    assert Questions(config.heldout, 0).take(0, 1)[0].tools is None


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([*PYTHON, '--data.tools=["pyton"]'], r"`tools` of \[data\] names 'pyton', did you mean 'python'\?"),
        (['--heldout.tools=["python"]'], r"`tools` of \[heldout\] names 'python', which .* it has none"),
        (["--conversation.max_turns=3"], "conversation.tools"),
        ([*PYTHON, "--conversation.tools.python.result=none"], r"no place for \{output\}"),
        (["--conversation.tools.python.type=pyhton"], "no tool is called 'pyhton', did you mean 'python'"),
        ([*PYTHON, "--conversation.tools.python.weight=1"], "weight"),
        (
            [*PYTHON, *AHEAD, "--rollout.weights_change=partial_rollouts"],
            "cuts turns, which .conversation. does not take up again",
        ),
        ([*PYTHON, "--rollout.routing_replay=true"], "routing_replay: the experts of a tool's last reply"),
    ],
)
def test_bad_sections_are_refused(rl_file: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(rl_file, overrides, RLConfig)


def test_an_evaluation_has_them_too() -> None:
    tree: dict[str, Any] = {
        "output": "runs/evaluation", "model": {"path": "model"}, "rollout": {"max_model_len": 64, "max_tokens": 32},
        "conversation": {"tools": {"python": {"type": "python"}}},
        "tasks": {"sums": {"task": {"type": "reasoning_gym", "dataset": "chain_sum"}, "tools": ["python"]}},
    }  # fmt: skip
    config = EvaluateConfig.model_validate(tree)
    assert config.tasks["sums"].asked().tools == ["python"]
    with pytest.raises(ValueError, match=r"`tools` of \[tasks\.sums\] names 'python'"):
        EvaluateConfig.model_validate({**tree, "conversation": None})
