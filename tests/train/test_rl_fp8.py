"""A run whose real engine serves FP8: it starts on the folder for engines, and is sent what such a one holds."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from megatron_r1.config.convert import CastConfig
from megatron_r1.config.load import validate
from megatron_r1.config.runs import RLConfig
from megatron_r1.convert.verbs import run_cast
from megatron_r1.train import rl
from tests.data.chat_rows import VOCABULARY, write_tokenizer
from tests.model.dense_models import write_dense
from tests.rollout.test_fp8_update import SHAPE
from tests.rollout.tiny_model import free_port

SUM = {
    "template": "{question}",
    "task": {"type": "reasoning_gym", "dataset": "chain_sum", "options": {"max_terms": 2, "max_digits": 1}},
}


def run(base: Path, output: Path, **changes: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "output": str(output),
        "steps": 1,
        "questions": 4,
        "group_size": 4,
        "minibatches": 1,
        "logprob_bound": 0.5,
        "model": {"path": str(base), "dtype": "bfloat16"},
        "tokenizer": str(base.with_name("tokenizer")),
        "data": SUM,
        "heldout": SUM,
        "rollout": {
            "port": free_port(),
            "start_timeout": 600.0,
            "max_model_len": 128,
            "max_tokens": 16,
            "kv_cache_gib": 0.1,
            "threads": 1,
            "fp8_path": str(base.with_name("fp8")),
            "arguments": ["--worker-extension-cls=tests.rollout.fp8_worker.Receiver"],
        },
        "evaluation": {"questions": 2, "samples": 1},
        "optim": {"lr": 1e-3},
        "report": {"console": False, "tensorboard": False},
    }
    return rl.run(validate(RLConfig, tree | changes, where="test"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8")
    write_dense(folder / "float32", "qwen3", **SHAPE | {"vocab_size": VOCABULARY, "initializer_range": 0.05})
    write_tokenizer(folder)
    run_cast(CastConfig(source=folder / "float32", output=folder / "base"))
    run_cast(CastConfig(source=folder / "base", output=folder / "fp8", dtype="fp8"))
    return folder / "base"


def test_a_run_with_an_engine_in_fp8(base: Path, tmp_path: Path) -> None:
    run(base, tmp_path)
    log = (tmp_path / "logs/engine-0.log").read_text()
    with safe_open(base.with_name("fp8") / "model.safetensors", "pt") as file:
        tensors = len(file.keys())
    assert f"received weights 0: {tensors} tensors" in log
    assert f"received weights 1: {tensors} tensors" in log
    assert str(base.with_name("fp8")) in log
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (difference,) = [row["logprob_difference_mean"] for row in rows if "logprob_difference_mean" in row]
    assert 1e-3 < difference < 0.5
