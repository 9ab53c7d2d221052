"""GPUs, network and limits."""

import resource
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_r1.doctor import gpus, machine
from megatron_r1.doctor.finding import Finding
from tests.doctor.environments import H100, make, nvidia_smi
from tests.doctor.test_packages import GPU

LARGE = machine.Machine(cores=64, memory=2000, disk=9000, shared=500)


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


@pytest.mark.parametrize(
    ("line", "cuda", "title", "part"),
    [
        (H100.format(driver="570.124.06", errors="0"), "13.0", "torch with driver", "driver is 570.124.06"),
        (H100.format(driver="580.95.05", errors="3"), "13.0", "GPU 0", "3 uncorrected errors"),
        (H100.format(driver="520.61.05", errors="0"), "12.8", "torch with driver", ">=525.60.13"),
    ],
)
def test_a_gpu_that_cannot_be_used(tmp_path: Path, line: str, cuda: str, title: str, part: str) -> None:
    sick = make(tmp_path, {"torch": "2.13.0"}, cuda)
    nvidia_smi(sick, [line])
    assert part in sick.bad()[title]


def test_eight_good_ones(tmp_path: Path) -> None:
    node = make(tmp_path, GPU, "13.0")
    nvidia_smi(node, [H100.format(driver="580.95.05", errors="0")] * 8)
    found = node.findings()
    assert found["GPUs"]["found"] == "8 x NVIDIA H100 80GB HBM3 80 GiB, compute capability 9.0"
    assert node.bad() == {}


def test_torch_that_does_not_see_them(tmp_path: Path) -> None:
    blind = make(tmp_path, GPU, "13.0")
    nvidia_smi(blind, [H100.format(driver="580.95.05", errors="0")])
    said = blind.doctor()  # not --quick: the torch of this environment refuses to be imported
    assert said.returncode == 1
    assert "ImportError: nobody is to import it" in said.stdout


def test_a_driver_that_fails(tmp_path: Path) -> None:
    dead = make(tmp_path, {})
    nvidia_smi(dead, ["Failed to initialize NVML: Driver/library version mismatch"], code=18)
    assert "Driver/library version mismatch" in dead.bad()["GPUs"]


def test_ports_of_infiniband(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        port = tmp_path / name / "ports/1"
        port.mkdir(parents=True)
        (port / "state").write_text(state + "\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    monkeypatch.setattr(gpus, "PORTS", tmp_path)
    found = by_name(gpus.findings(gpus.Gpus([]), quick=True))
    assert found["InfiniBand"].found == "1 of 2 ports active: 400 Gb/sec (4X NDR)"
    assert "NCCL_IB_HCA=^mlx5_1" in found["InfiniBand ports"].fix
    limited = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY
    assert ("locked memory" in found) == limited


def test_numa_balancing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "KERNEL", tmp_path)
    one = gpus.Gpus([gpus.Gpu("H100", 80.0, "580", "9.0", "0", "Disabled")])
    for value, noted in (("1", True), ("0", False)):
        (tmp_path / "numa_balancing").write_text(value)
        assert ("NUMA balancing" in by_name(gpus.findings(one, quick=True))) == noted


def test_a_port_that_is_taken() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        holder.listen()
        taken = by_name(machine.findings(LARGE, port))["port of the first engine"]
    assert (taken.state, f"--rollout.port={port + 100}" in taken.fix) == ("note", True)
    assert by_name(machine.findings(LARGE, port))["port of the first engine"].state == "ok"


def test_a_container_that_was_given_little() -> None:
    small = by_name(machine.findings(replace(LARGE, shared=0.0625)))["shared memory"]
    assert (small.state, "--shm-size" in small.fix) == ("note", True)


@pytest.mark.parametrize(("given", "state"), [(None, "note"), ("1", "ok"), ("99999", "note"), ("many", "note")])
def test_threads(monkeypatch: pytest.MonkeyPatch, given: str | None, state: str) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert by_name(machine.findings(LARGE))["threads of a process"].state == state


def test_this_machine() -> None:
    here = machine.look(Path.cwd())
    total = int(next(line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line))
    assert 0 < here.memory <= total / 2**20 + 0.1
    assert here.cores >= 0.1
