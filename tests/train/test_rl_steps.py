"""The loop of `rl`, with responses that no engine has made: what signals and bad updates do to a run."""

import json
import os
import random
import signal
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_r1.checkpoint.signals import SAVED
from megatron_r1.cli import _terminate
from megatron_r1.config.load import validate
from megatron_r1.config.runs import RLConfig
from megatron_r1.config.sections import ParallelSection, PolicySection
from megatron_r1.errors import EngineError, NumericsError
from megatron_r1.model import hf_folder
from megatron_r1.model.build import build_model
from megatron_r1.model.parallel import initialize
from megatron_r1.train import rl
from megatron_r1.train.collector import Collector, by_token
from megatron_r1.train.learner import Learner
from megatron_r1.types import Group, Question, Sample
from tests.data.chat_rows import VOCABULARY, write_tokenizer
from tests.train.conftest import MODEL

TIMES = ("seconds", "elapsed", "time", "tokens_per", "tflops", "mfu", "memory", "learner_idle")
"""Figures that differ between two runs of the same."""
SUM = {"type": "reasoning_gym", "dataset": "chain_sum"}


def test_a_step_ends_in_the_token_that_holds_its_last_character() -> None:
    pieces = ["", "3+", "4", "=7,", " 7", "+1=8", ""]
    marks = [(5, 1.0), (12, 0.0)]  # "3+4=7" and ", 7+1=8"
    assert "".join(pieces)[:5] == "3+4=7"
    assert by_token(marks, pieces) == [(3, 1.0), (5, 0.0)]
    assert by_token([], pieces) == []


class Answering(Collector):
    """Random responses, by the seed that an engine would get, and rewards of their first tokens."""

    sent: signal.Signals | None = None
    """Comes in the rollout from the weights after two steps, which then takes very long."""
    gone: str | None = None
    """Where no engine is left: "rollout" or "push", with the weights after two steps."""

    def __exit__(self, *error: Any) -> None:
        if self.sent:
            os.kill(os.getpid(), signal.SIGTERM)  # once more, while engines are closed
        super().__exit__(*error)

    def push(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        assert list(named_tensors)
        if self.gone == "push" and version == 2:
            raise EngineError("all engines are gone")
        self._version = version

    def _open(self) -> None:
        pass

    def _collect(self, questions: Sequence[Question], n: int, seed: int, temperature: float | None) -> list[Group]:
        if self.sent and self._version == 2:
            os.kill(os.getpid(), self.sent)
            time.sleep(60)
        if self.gone == "rollout" and self._version == 2:
            raise EngineError("all engines are gone")
        rng = random.Random(seed)
        return [Group(question, [5, 6, 7], [self._sample(rng) for _ in range(n)]) for question in questions]

    def _sample(self, rng: random.Random) -> Sample:
        tokens = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 9))]
        reward = tokens[0] / VOCABULARY
        return Sample(tokens, [-5.0] * len(tokens), "", True, self._version, reward=reward, rewards={"first": reward})

    @property
    def counters(self) -> dict[str, int]:
        return {}

    def fleet_figures(self) -> dict[str, float]:
        return {"fleet_idle": 0.25}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights and its own tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = write_tokenizer(folder)
    config = json.loads((MODEL / "config.json").read_text())
    config |= {"num_nextn_predict_layers": 0, "vocab_size": VOCABULARY}
    (folder / "config.json").write_text(json.dumps(config))
    initialize(ParallelSection(), seed=1)
    model = build_model(PolicySection(path=folder, load_weights=False, dtype="float32", init_std=0.08), 64)
    hf_folder.write(folder / "hf", model.hf, model.export(torch.float32), tokenizer)
    return folder / "hf"


def run(base: Path, output: Path, **changes: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "output": str(output),
        "steps": 4,
        "questions": 3,
        "group_size": 4,
        "minibatches": 2,
        "logprob_bound": 100.0,
        "model": {"path": str(base), "dtype": "float32"},
        "data": {"task": SUM},
        "heldout": {"task": SUM},
        "rewards": {"first": {"type": "task"}},
        "loss": {"type": "grpo", "kl_coef": 0.05},
        "rollout": {"max_model_len": 64, "max_tokens": 32},
        "evaluation": {"questions": 2, "samples": 1},
        "optim": {"lr": 1e-4},
        "checkpoint": {"every": 100},
        "report": {"console": False, "tensorboard": False},
    }
    return rl.run(validate(RLConfig, tree | changes, where="test"))


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> type[Answering]:
    monkeypatch.setattr(rl, "Collector", Answering)
    monkeypatch.setattr(Answering, "sent", None)
    monkeypatch.setattr(Answering, "gone", None)
    return Answering


def weights(output: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(output / "hf/model.safetensors")
    return found


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
def test_a_rollout_is_left_at_once_and_the_steps_before_are_saved(
    answering: type[Answering], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals
) -> None:
    """The resumed run ends with the bits of the undisturbed one; the guard's window included.

    Further signals change nothing, not even the last, which comes when the run's own part is over.
    """
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, _terminate)
    guard = {"spike": "skip", "window": 4, "spike_sigma": 1e-3, "max_skips": 100}
    summary = run(base, tmp_path / "whole", guard=guard)
    assert "so the update was skipped" in (tmp_path / "whole/run.log").read_text()
    monkeypatch.setattr(answering, "sent", sent)
    with pytest.raises(SystemExit) as ended:
        run(base, tmp_path / "cut", guard=guard)
    os.kill(os.getpid(), sent)
    assert ended.value.code == SAVED
    assert [path.name for path in (tmp_path / "cut/checkpoints").iterdir()] == ["step_00000002"]
    monkeypatch.setattr(answering, "sent", None)
    again = run(base, tmp_path / "cut", guard=guard)
    ours, theirs = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert again | {name: summary[name] for name in ("model", "seconds_total")} == summary


@pytest.mark.parametrize("gone", ["rollout", "push"])
def test_without_engines_the_steps_before_are_saved(
    answering: type[Answering], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    """Where the push fails, the step whose weights were to be pushed is one of them."""
    run(base, tmp_path / "whole", steps=3)
    monkeypatch.setattr(answering, "gone", gone)
    with pytest.raises(EngineError, match="all engines are gone"):
        run(base, tmp_path / "cut", steps=3)
    assert [path.name for path in (tmp_path / "cut/checkpoints").iterdir()] == ["step_00000002"]
    monkeypatch.setattr(answering, "gone", None)
    run(base, tmp_path / "cut", steps=3)
    ours, theirs = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    lines = (tmp_path / "cut/metrics.jsonl").read_text().splitlines()
    assert [row["step"] for row in map(json.loads, lines) if row["kind"] == "step"] == [0, 1, 2]


def test_a_step_that_has_begun_is_not_saved(
    answering: type[Answering], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its questions are taken: with the weights before it they are no state that a run could go on from."""

    def refused(self: rl._Training, figures: object) -> None:
        if self._done == 2:
            raise EngineError("the engine does not match")

    monkeypatch.setattr(rl._Training, "_compare", refused)
    with pytest.raises(EngineError, match="does not match"):
        run(base, tmp_path, steps=3, checkpoint={"every": 1000})
    assert not (tmp_path / "checkpoints").exists()


def test_an_update_that_is_not_finite_stops_the_run(answering: type[Answering], base: Path, tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match=r"step [01]: .*so the update was refused; the batch is in"):
        run(base, tmp_path, optim={"lr": 1e30})
    assert len(list((tmp_path / "bad_batches").rglob("rank_0.pt"))) == 1


def test_with_one_update_a_step_only_the_first_has_a_pass_for_the_old_logprobs(
    answering: type[Answering], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And everything else is as with such a pass at every step: weights bit for bit, figures, what samples show."""
    scored: list[int] = []
    score = Learner.score

    def counted(self: Learner, groups: Sequence[Group], step: int) -> Any:
        scored.append(step)
        return score(self, groups, step)

    monkeypatch.setattr(Learner, "score", counted)
    changes = {"steps": 3, "minibatches": 1, "loss": {"type": "grpo", "kl_coef": 0.0}}
    run(base, tmp_path / "one", **changes)
    assert scored == [0], "the gate needs them before the first update"
    monkeypatch.setattr(Learner, "on_policy", property(lambda self: False))
    run(base, tmp_path / "two", **changes)
    assert scored == [0, 0, 1, 2]
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    shown = [
        [
            {name: value for name, value in json.loads(line).items() if not name.startswith(TIMES)}
            for line in (tmp_path / folder / file).read_text().splitlines()
        ]
        for file in ("metrics.jsonl", "samples.jsonl")
        for folder in ("one", "two")
    ]
    assert shown[0] == shown[1]
    assert shown[2] == shown[3]


def test_what_a_step_records(answering: type[Answering], base: Path, tmp_path: Path) -> None:
    run(base, tmp_path, steps=1)
    [row] = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if '"step", ' in line]
    assert row["tflops"] > 0
    assert row["memory_peak_max"] > 0
    assert {name for name in row if name.startswith("seconds/")} >= {"seconds/rollout", "seconds/update"}
    assert [path.name for path in (tmp_path / "heartbeats").glob("*.json")] == ["rank_0.json"]
