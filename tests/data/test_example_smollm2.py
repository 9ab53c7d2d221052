"""The run files in `examples/smollm2` belong together."""

from pathlib import Path

import pytest

from megatron_r1.config.evaluation import EvaluateConfig
from megatron_r1.config.load import load
from megatron_r1.config.runs import RLConfig
from megatron_r1.data.questions import Questions, heldout, texts

ROOT = Path(__file__).parents[2]


def test_what_is_evaluated_is_what_training_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    training = load(Path("examples/smollm2/grpo.toml"), [], RLConfig)
    exam = load(Path("examples/smollm2/evaluate.toml"), [], EvaluateConfig)
    sums = exam.tasks["sums"]
    assert sums.asked().task == training.heldout.task == training.data.task
    assert sums.template == training.heldout.template == training.data.template
    assert sums.questions == training.evaluation.questions
    left_out = texts(heldout(sums.asked(), sums.questions))
    asked = Questions(training.data, training.seed, exclude=left_out).take(0, training.steps * training.questions)
    assert len(left_out) == 256
    assert not left_out & texts(asked)
    assert sums.template == "{question}"
