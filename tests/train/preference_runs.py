"""A preference that a tiny model can learn (the good response has a 9 in it), as files and as a run."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_r1.config.runs import TokenizerConfig
from megatron_r1.data.tokenizer import train
from tests.train.conftest import MODEL


def responses(rng: random.Random) -> tuple[str, str]:
    """One with a 9, one without; of random lengths, so that length tells nothing."""
    good, bad = ([rng.choice("012345678") for _ in range(rng.randint(3, 9))] for _ in range(2))
    good[rng.randrange(len(good))] = "9"
    return "".join(good), "".join(bad)


WARNS = {"spike": "warn", "window": 4, "spike_sigma": 1e-6}
"""[guard] that finds fault with most updates."""


def bad_batches(output: Path) -> list[dict[str, Any]]:
    """The microbatches of the updates that `WARNS` has found."""
    paths = sorted((output / "bad_batches").rglob("rank_0.pt"))
    return [micro for path in paths for micro in torch.load(path, weights_only=True)["microbatches"]]


def throughput(output: Path) -> list[list[float]]:
    """Tokens and 10^12 operations a second, and GiB, of each step."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    names = ("tokens_per_second", "tflops", "memory_peak_max")
    return [[row[name] for name in names] for row in rows if row["kind"] == "step"]


def write_pairs(path: Path, count: int, seed: int = 0) -> Path:
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        chosen, rejected = responses(rng)
        rows.append({"prompt": f"User: {number}? Assistant:", "chosen": chosen, "rejected": rejected})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_labels(path: Path, count: int, seed: int = 0) -> Path:
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        label = rng.randint(0, 1)
        text = responses(rng)[1 - label]
        rows.append({"prompt": f"User: {number}? Assistant:", "response": text, "label": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_tokenizer(folder: Path) -> Path:
    """Digits, tags and a little more."""
    texts = [f"User: {n}, {n * 7919}? Assistant: <think>a, b</think> <answer>{n}</answer>" for n in range(200)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tags = ["<think>", "</think>", "<answer>", "</answer>"]
    output = folder / "tokenizer"
    train(TokenizerConfig(input=[folder / "texts.jsonl"], output=output, vocab_size=300, special_tokens=tags))
    return output


def model_folder(folder: Path) -> Path:
    """config.json of the tiny model without its MTP layer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((MODEL / "config.json").read_text()) | {"num_nextn_predict_layers": 0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def settings(folder: Path, tokenizer: Path, data: Path, **changes: Any) -> dict[str, Any]:
    """A run of a few steps from random weights."""
    return {
        "output": folder / "run",
        "model": {
            "path": model_folder(folder / "model"),
            "load_weights": False,
            "dtype": "float32",
            "init_std": 0.08,
        },
        "tokenizer": tokenizer,
        "data": [data],
        "heldout_share": 0.2,
        "max_length": 64,
        "batch": 32,
        "tokens_per_microbatch": 2048,
        "optim": {"lr": 3e-3, "weight_decay": 0.0},
        "report": {"tensorboard": False, "console": False},
        "checkpoint": {"every": 4, "keep": 100},
        **changes,
    }


def equal_when_killed(run: Callable[[Any], dict[str, Any]], config: Any, finished: Path) -> None:
    """The run goes on bit for bit from the disk that a process killed after step 4 leaves.

    Args:
        run: the verb.
        config: of a run that has ended, whose output is `finished`.
    """
    undisturbed = finished.with_name("undisturbed")
    shutil.copytree(finished, undisturbed)
    for path in (finished / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > 4:
            shutil.rmtree(path)
    shutil.rmtree(finished / "hf")
    (finished / "summary.json").unlink()
    run(config)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (undisturbed, finished)]
    for summary in summaries:
        del summary["seconds_total"]
    assert summaries[0] == summaries[1]
    files = [folder / "hf/model.safetensors" for folder in (undisturbed, finished)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len(load_file(files[0])) > 20
