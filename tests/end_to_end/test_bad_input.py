"""What a user gets wrong is said in one line, before any engine starts, and the exit code is 2 (1 for a busy port)."""

import json
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.cli import main
from tests.end_to_end import runs

Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The command line runs inside this process, to save it the imports; its signal handler goes with the test."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a verb that must fail, leave no checkpoint (by code 2, nothing) and say one line, which is returned."""

    def run(verb: str, tree: dict[str, Any], code: int = 2) -> str:
        assert main([verb, str(runs.write(tmp_path / f"{verb}.toml", tree))]) == code
        errors = capsys.readouterr().err.splitlines()
        [said] = [line for line in errors if line.startswith(f"megatron-r1 {verb}: ")]
        assert "Traceback" not in "".join(errors)
        assert not (tmp_path / "run/checkpoints").exists()
        assert not (tmp_path / "run/logs").exists(), "an engine was started"
        assert code != 2 or not (tmp_path / "run").exists()
        return said

    return run


def folder_with(prepared: Path, target: Path, **config: object) -> Path:
    """A copy of the base model with another config.json."""
    shutil.copytree(prepared / "base/hf", target)
    file = target / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return target


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"corpus": {"train": ["nowhere/train"], "sequence_length": 64}}, ["nowhere/train.idx", "data index"]),
        ({"tokenizer": "nowhere"}, ["nowhere", "tokenizer.json"]),
        ({"model": {"path": "nowhere", "load_weights": False}}, ["nowhere/config.json"]),
        ({"batch": 3}, ["batch 3", "microbatch 2"]),
    ],
)
def test_pretrain(prepared: Path, tmp_path: Path, refused: Refused, change: dict[str, Any], parts: list[str]) -> None:
    said = refused("pretrain", runs.pretrain(prepared, tmp_path / "run") | change)
    assert [part for part in parts if part not in said] == []


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"model": {"path": "nowhere"}}, ["nowhere"]),
        ({"tokenizer": "nowhere"}, ["nowhere", "tokenizer.json"]),
        ({"group_size": 1}, ["group_size 1", "at least 2"]),
        ({"questions": 3, "group_size": 3}, ["3 questions x 3 samples = 9", "2 minibatches"]),
        ({"rewards": {"length": {"type": "lenght"}}}, ["lenght"]),
        ({"loss": {"type": "grpo", "kl_coeff": 0.1}}, ["kl_coeff", "'kl_coef'"]),
    ],
)
def test_rl(prepared: Path, tmp_path: Path, refused: Refused, change: dict[str, Any], parts: list[str]) -> None:
    said = refused("rl", runs.rl(prepared, tmp_path / "run", runs.free_port()) | change)
    assert [part for part in parts if part not in said] == []


def test_a_tokenizer_that_does_not_fit(prepared: Path, tmp_path: Path, refused: Refused) -> None:
    """340 tokens in the tokenizer, 300 rows in the embedding."""
    model = folder_with(prepared, tmp_path / "model", vocab_size=300)
    for verb, tree in {
        "pretrain": runs.pretrain(prepared, tmp_path / "run"),
        "rl": runs.rl(prepared, tmp_path / "run", runs.free_port()) | {"tokenizer": str(prepared / "tokenizer")},
    }.items():
        tree["model"] |= {"path": str(model), "load_weights": False, "mtp_loss_coef": 0.1}
        said = refused(verb, tree)
        assert "the tokenizer has 340 tokens, but the model's vocab_size is 300" in said


def test_a_model_without_weights(prepared: Path, tmp_path: Path, refused: Refused) -> None:
    model = folder_with(prepared, tmp_path / "model")
    weights = model / "model.safetensors"
    tree = runs.rl(prepared, tmp_path / "run", runs.free_port())
    tree["model"] |= {"path": str(model)}
    weights.write_bytes(weights.read_bytes()[:5000])
    assert str(weights) in refused("rl", tree)
    weights.unlink()
    assert str(model) in refused("rl", tree)


def test_a_port_in_use(prepared: Path, tmp_path: Path, refused: Refused) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        said = refused("rl", runs.rl(prepared, tmp_path / "run", port), code=1)
    assert f"port {port} on 127.0.0.1" in said
    assert "rollout.port" in said
