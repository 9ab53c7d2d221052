"""Cores, memory, disk, limits: what Linux says of this machine, or of the container around this process."""

import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.doctor.finding import Finding

PART = "machine"
GIB = 2**30
PORT = 8700
"""What `rollout.port` is where a run file does not say."""
LEAST_SHARED = 1.0
"""GiB of shared memory under which engines and data loaders of torch fail; a container has 64 MiB if not told."""
LEAST_FILES = 4096
"""Open files: an engine holds a connection for each sample that is under way."""
_GROUPS = Path("/sys/fs/cgroup")
_BOX_SECONDS = 20.0
_NAMESPACES = (
    "as root on the host: sysctl -w kernel.unprivileged_userns_clone=1 "
    "kernel.apparmor_restrict_unprivileged_userns=0 user.max_user_namespaces=10000, whichever exists; in a container: "
    "docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined "
    "--security-opt systempaths=unconfined"
)


@dataclass(frozen=True)
class Machine:
    """What the examples are measured against."""

    cores: float
    memory: float
    """GiB, of the container if it has a limit."""
    disk: float
    """GiB free where the command was started."""
    shared: float
    """GiB free in /dev/shm."""


def look(folder: Path) -> Machine:
    """This machine; `folder` is where runs would be written."""
    shared = Path("/dev/shm")
    return Machine(
        min(float(len(os.sched_getaffinity(0))), _quota()),
        min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), _limit()) / GIB,
        shutil.disk_usage(folder).free / GIB,
        shutil.disk_usage(shared).free / GIB if shared.is_dir() else 0.0,
    )


def findings(machine: Machine, port: int = PORT) -> list[Finding]:
    """All about the machine but its GPUs and network."""
    return [
        _system(),
        Finding(PART, "cores", "ok", f"{machine.cores:g}"),
        Finding(PART, "memory", "ok", f"{machine.memory:.1f} GiB"),
        Finding(PART, "disk", "ok", f"{machine.disk:.0f} GiB free in {Path.cwd()}"),
        _shared(machine),
        _threads(machine),
        _files(),
        _port(port),
        _boxes(),
    ]


def _system() -> Finding:
    found = f"{platform.system()} {platform.release()}, {platform.machine()}"
    if sys.platform == "linux" and platform.machine() in {"x86_64", "aarch64"}:
        return Finding(PART, "system", "ok", found)
    return Finding(
        PART, "system", "bad", found, "vLLM's and torch's wheels are for Linux on x86_64 or aarch64: use one"
    )


def _shared(machine: Machine) -> Finding:
    found = f"{machine.shared:.1f} GiB free in /dev/shm"
    if machine.shared >= LEAST_SHARED:
        return Finding(PART, "shared memory", "ok", found)
    fix = "docker run --shm-size=16g, or as root: mount -o remount,size=16G /dev/shm"
    return Finding(PART, "shared memory", "note", f"{found}: too little for engines", fix, frozenset({"engine"}))


def _threads(machine: Machine) -> Finding:
    given = os.environ.get("OMP_NUM_THREADS")
    if given and given.isdigit() and 0 < int(given) <= machine.cores:
        return Finding(PART, "threads of a process", "ok", f"OMP_NUM_THREADS={given}")
    found = f"OMP_NUM_THREADS={given}" if given else "OMP_NUM_THREADS is not set: each process takes all cores"
    return Finding(PART, "threads of a process", "note", found, "export OMP_NUM_THREADS=1")


def _files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= LEAST_FILES or soft == resource.RLIM_INFINITY:
        return Finding(PART, "open files", "ok", f"{soft:,}")
    raised = "docker run --ulimit nofile=65536; elsewhere nofile in /etc/security/limits.conf, as root"
    more = "ulimit -n 65536" if hard >= 65536 or hard == resource.RLIM_INFINITY else raised
    return Finding(PART, "open files", "note", f"{soft:,} at most: few for many samples at once", more)


def _port(port: int) -> Finding:
    name = "port of the first engine"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            found = f"{port} cannot be used: {error.strerror}"
            fix = f"ss -ltnp | grep :{port} shows who holds it; or --rollout.port={port + 100}"
            return Finding(PART, name, "note", found, fix, frozenset({"engine"}))
    return Finding(PART, name, "ok", f"{port} is free")


def _boxes() -> Finding:
    """Starts bubblewrap as the sandbox of code rewards does, with nothing in it."""
    serves = frozenset({"code"})
    beside = str(Path(sys.executable).parent)
    path = shutil.which("bwrap") or shutil.which("bwrap", path=beside)
    if path is None:
        fix = f"apt-get install bubblewrap; without root: requirements/bubblewrap.sh {Path(sys.prefix)}"
        return Finding(PART, "bubblewrap", "note", "not installed: rewards that run code do not start", fix, serves)
    command = [path, "--ro-bind", "/", "/", "--unshare-all", "--die-with-parent", "true"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BOX_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Finding(PART, "bubblewrap", "note", f"a box took more than {_BOX_SECONDS:g} s", "look at dmesg", serves)
    if done.returncode == 0:
        return Finding(PART, "bubblewrap", "ok", f"{path}: a box starts")
    said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return Finding(PART, "bubblewrap", "note", f"a box does not start: {said}", _NAMESPACES, serves)


def _quota() -> float:
    """Cores that the container may use."""
    quota, _, period = _read(_GROUPS / "cpu.max").partition(" ")
    return float(quota) / float(period) if quota.isdigit() and period.isdigit() else float("inf")


def _limit() -> float:
    """Bytes of memory that the container may use."""
    text = _read(_GROUPS / "memory.max")
    return float(text) if text.isdigit() else float("inf")


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
