"""NVIDIA's GPUs, driver and network: what `nvidia-smi`, torch in a process of its own, and Linux say of them."""

import csv
import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import megatron_r1
from megatron_r1.doctor.finding import Finding
from megatron_r1.doctor.versions import cuda_of_torch, installed
from megatron_r1.wording import counted

PART = "GPUs and network"
SMI_SECONDS = 20.0
TORCH_SECONDS = 120.0
PORTS = Path("/sys/class/infiniband")
KERNEL = Path("/proc/sys/kernel")
_MODULES = Path("/sys/module")
_COLUMNS = "name,memory.total,driver_version,compute_cap,ecc.errors.uncorrected.volatile.total,mig.mode.current"
_ASK = """
import json, torch
from megatron_r1.doctor import nccl
ones = torch.ones(256, 256, device="cuda")
print(json.dumps({
    "devices": torch.cuda.device_count(),
    "right": bool((ones @ ones == 256).all()),
    "nccl": ".".join(map(str, nccl.version())),
    "peers": all(torch.cuda.can_device_access_peer(0, other) for other in range(1, torch.cuda.device_count())),
}))
"""


@dataclass(frozen=True)
class Gpu:
    """One GPU, as `nvidia-smi` names it."""

    name: str
    memory: float
    """GiB."""
    driver: str
    capability: str
    errors: str
    """Uncorrected ones of its memory since the driver was loaded; not a number where it does not count them."""
    mig: str


@dataclass(frozen=True)
class Gpus:
    """Those of this machine."""

    all: list[Gpu]
    problem: str = ""
    """Why `nvidia-smi` did not say."""

    @property
    def driver(self) -> str | None:
        """Its version; None = no GPU."""
        return self.all[0].driver if self.all else None


def look() -> Gpus:
    """Ask `nvidia-smi`."""
    program = shutil.which("nvidia-smi")
    if program is None:
        here = list(Path("/dev").glob("nvidia[0-9]*"))
        return Gpus([], f"{here[0]} is there, nvidia-smi is not" if here else "")
    command = [program, f"--query-gpu={_COLUMNS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Gpus([], f"nvidia-smi did not answer in {SMI_SECONDS:g} s")
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        return Gpus([], f"nvidia-smi: {said[-1]}")
    rows = [[cell.strip() for cell in row] for row in csv.reader(done.stdout.splitlines()) if row]
    return Gpus([Gpu(row[0], float(row[1]) / 1024, *row[2:]) for row in rows])


def findings(gpus: Gpus, quick: bool) -> list[Finding]:
    """All about GPUs and InfiniBand; `quick` = without torch, whose import takes seconds."""
    if gpus.problem:
        fix = "on the host: sudo dmesg | grep -i nvrm, and install the driver anew; a container needs --gpus all"
        return [Finding(PART, "GPUs", "bad", gpus.problem, fix, frozenset({"gpu"}))]
    if not gpus.all:
        fix = "runs on CPU work without; for GPUs install NVIDIA's driver, in a container: docker run --gpus all"
        return [
            Finding(PART, "GPUs", "absent", "none (there is no nvidia-smi)", fix, frozenset({"gpu"})),
            *_network(gpus),
        ]
    return [*_devices(gpus), *([] if quick else [_torch(gpus)]), *_kernel(), *_network(gpus)]


def _devices(gpus: Gpus) -> list[Finding]:
    first = gpus.all[0]
    kinds = ", ".join(sorted({f"{gpu.name} {gpu.memory:.0f} GiB" for gpu in gpus.all}))
    found = [
        Finding(PART, "GPUs", "ok", f"{len(gpus.all)} x {kinds}, compute capability {first.capability}"),
        Finding(PART, "driver", "ok", first.driver),
    ]
    for index, gpu in enumerate(gpus.all):
        if gpu.errors.isdigit() and int(gpu.errors):
            fix = f"drain the node; sudo nvidia-smi --gpu-reset -i {index}, and if they come back replace it"
            text = f"{counted(int(gpu.errors), 'uncorrected error')} of its memory"
            found.append(Finding(PART, f"GPU {index}", "bad", text, fix))
        if gpu.mig == "Enabled":
            fix = f"sudo nvidia-smi -i {index} -mig 0"
            found.append(Finding(PART, f"GPU {index}", "note", "is cut into MIG slices", fix, frozenset({"gpu"})))
    return found


def _torch(gpus: Gpus) -> Finding:
    name = "torch sees them"
    if installed("torch") is None or cuda_of_torch() is None:
        fix = "requirements/install.sh .venv requirements/gpu.lock in a new .venv"
        return Finding(PART, name, "note", "the installed torch is for CPU", fix, frozenset({"gpu"}))
    path = os.pathsep.join(filter(None, [str(Path(megatron_r1.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-c", _ASK]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TORCH_SECONDS, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        return Finding(PART, name, "bad", f"no answer in {TORCH_SECONDS:g} s", "nvidia-smi -q | grep -A3 Fabric")
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        fix = "with NVLink switches: systemctl status nvidia-fabricmanager; else a driver that suits torch's CUDA"
        return Finding(PART, name, "bad", said, fix)
    seen = json.loads(done.stdout.splitlines()[-1])
    found = f"{seen['devices']}, NCCL {seen['nccl']}"
    if not seen["right"]:
        return Finding(PART, name, "bad", f"{found}: a product of matrices is wrong", "replace the first GPU")
    if seen["devices"] < len(gpus.all):
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return Finding(
            PART, name, "note", f"{found}, not all (CUDA_VISIBLE_DEVICES={hidden})", "unset CUDA_VISIBLE_DEVICES"
        )
    return Finding(PART, name, "ok", found + ("" if seen["peers"] else ", without direct access to each other"))


def _kernel() -> list[Finding]:
    """Settings of Linux that slow GPUs down."""
    balancing = _text(KERNEL / "numa_balancing")
    if balancing in {"", "0"}:
        return []
    found = "moves pages while GPUs read them"
    return [Finding(PART, "NUMA balancing", "note", found, "sudo sysctl -w kernel.numa_balancing=0")]


def _network(gpus: Gpus) -> list[Finding]:
    """InfiniBand and RoCE ports, and what GPUs need to use them."""
    ports = sorted(PORTS.glob("*/ports/*")) if PORTS.is_dir() else []
    if not ports:
        fix = "in a container: docker run --device=/dev/infiniband --network=host; on the host: ibstat"
        return [
            Finding(
                PART,
                "InfiniBand",
                "note" if gpus.all else "absent",
                "none: runs of one node only",
                fix,
                frozenset({"nodes"}),
            )
        ]
    down = [port.parents[1].name for port in ports if "ACTIVE" not in _text(port / "state")]
    rates = sorted({_text(port / "rate") for port in ports})
    found = [
        Finding(PART, "InfiniBand", "ok", f"{len(ports) - len(down)} of {len(ports)} ports active: {', '.join(rates)}")
    ]
    if down:
        fix = f"ibstat {down[0]}; if it is not to be used: export NCCL_IB_HCA=^{','.join(down)}"
        found.append(Finding(PART, "InfiniBand ports", "note", f"down: {', '.join(down)}", fix))
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY:
        fix = "ulimit -l unlimited; docker run --ulimit memlock=-1; Slurm: PropagateResourceLimitsExcept=MEMLOCK"
        found.append(
            Finding(
                PART, "locked memory", "note", "limited: InfiniBand cannot register buffers", fix, frozenset({"nodes"})
            )
        )
    if gpus.all and not (_MODULES / "nvidia_peermem").is_dir():
        fix = "sudo modprobe nvidia_peermem, where the driver has no DMA-BUF"
        found.append(Finding(PART, "GPUDirect RDMA", "note", "nvidia_peermem is not loaded", fix))
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
