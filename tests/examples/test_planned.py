"""Run files whose head says how they are planned: the command as it stands there, and what it says."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.plan import PlanConfig
from megatron_r1.plan.verb import run

ROOT = Path(__file__).parents[2]
GPUS = {
    "r1_zero/qwen2_5_7b": 8,
    "r1_zero/moonlight_16b_a3b": 32,
    "r1_zero/qwen3_30b_a3b": 32,
    "deepseek_v3/pretrain": 2048,
    "deepseek_v3/extend_32k": 2048,
    "deepseek_v3/extend_128k": 2048,
}
"""Run file -> GPUs of all."""


def command(path: Path) -> list[str]:
    """The arguments of `megatron-r1 plan` in a run file's head."""
    lines = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    found = re.search(r"megatron-r1 plan (.*?)(?:  #|$)", "\n".join(lines).replace("\\\n", ""), re.MULTILINE)
    assert found, path
    return shlex.split(found.group(1))


def planned(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    words = command(path)
    overrides = [word for word in words if re.match(r"--\w+\.", word)]
    file, *options = [word for word in words if word not in overrides]
    named = {
        name.removeprefix("--").replace("-", "_"): int(value)
        for name, value in zip(options[::2], options[1::2], strict=True)
    }
    code = run(PlanConfig(run_file=Path(file), **named), overrides, as_json=True)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert code == 0, found["findings"]
    return found


@pytest.mark.parametrize("name", GPUS)
def test_it_fits(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = planned(ROOT / f"examples/{name}.toml", capsys)
    assert found["fits"]
    assert found["gpus"] == GPUS[name]
    assert found["gpu_hours"] > 0
