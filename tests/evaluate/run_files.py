"""Parts of the run files of these tests, and the lines that they write."""

import json
from pathlib import Path
from typing import Any

KNOWN = {"known": {"type": "tests.evaluate.scripted:Known"}}


def sampling(model: Path, **changes: Any) -> dict[str, Any]:
    """The keys that `evaluate` and [pass_rate] share."""
    rollout = {"max_model_len": 128, "max_tokens": 40, "max_num_seqs": 64, "kv_cache_gib": 0.1, "threads": 1}
    tree = {"model": {"path": str(model), "dtype": "float32"}, "rollout": rollout, "batch": 4, "reward_workers": 1}
    return tree | changes


def over(source: Path) -> dict[str, Any]:
    """The task over a file of sums."""
    return {"template": "r1_zero_short", "task": {"type": "math", "source": str(source)}}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
