"""Environments for the doctor to look at: metadata without packages, and a `nvidia-smi` that says what it is told."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OWN = ("packaging", "rich", "pygments", "markdown_it", "mdurl")
"""What the doctor's tables are made with."""
H100 = "NVIDIA H100 80GB HBM3, 81559, {driver}, 9.0, {errors}, Disabled"


@dataclass
class Environment:
    """A folder that stands for site-packages, and one that stands on PATH."""

    site: Path
    programs: Path
    variables: dict[str, str] = field(default_factory=dict)

    def doctor(self, *arguments: str, where: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run the verb with nothing else installed (-S: no site-packages)."""
        code = (
            "import sys, pathlib; from megatron_r1.doctor.verb import run; from megatron_r1.errors import UserError\n"
            "files = [pathlib.Path(word) for word in sys.argv[1:] if not word.startswith('--')]\n"
            "sys.exit(run(files[0] if files else None, '--quick' in sys.argv, '--json' in sys.argv))"
        )
        environment = {"PYTHONPATH": str(self.site), "PATH": f"{self.programs}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-S", "-c", code, *arguments],
            cwd=where or self.site,
            env=environment | self.variables,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def findings(self, *arguments: str) -> dict[str, dict[str, Any]]:
        """What it finds, by name."""
        done = self.doctor("--json", "--quick", *arguments)
        assert "Traceback" not in done.stderr, done.stderr
        said = json.loads(done.stdout)
        assert done.returncode == (0 if said["passed"] else 1)
        return {finding["name"]: finding for finding in said["findings"]}

    def bad(self, *arguments: str) -> dict[str, str]:
        """Names of what is bad, with what is said of it."""
        return {name: one["found"] for name, one in self.findings(*arguments).items() if one["state"] == "bad"}


def make(
    folder: Path,
    installed: Mapping[str, str],
    cuda: str | None = None,
    requires: tuple[str, ...] = (),
    own: bool = True,
) -> Environment:
    """An environment in which `installed` seems to be, torch being built for `cuda`."""
    site, programs = folder / "site", folder / "programs"
    site.mkdir()
    programs.mkdir()
    (site / "megatron_r1").symlink_to(ROOT / "megatron_r1")
    for name, version in {"megatron-r1": "0", **installed}.items():
        metadata = site / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        lines = [f"Requires-Dist: {line}" for line in requires if name == "megatron-r1"]
        metadata.write_text("\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines, ""]))
    if "torch" in installed:
        (site / "torch").mkdir()
        (site / "torch/version.py").write_text(f"cuda: Optional[str] = {cuda!r}\n")
        (site / "torch/__init__.py").write_text("raise ImportError('nobody is to import it')\n")
    for module in OWN if own else ():
        spec = importlib.util.find_spec(module)
        assert spec
        assert spec.submodule_search_locations
        (site / module).symlink_to(spec.submodule_search_locations[0])
    return Environment(site, programs, {"HOME": str(folder), "LANG": os.environ.get("LANG", "C.UTF-8")})


def nvidia_smi(environment: Environment, lines: list[str], code: int = 0) -> None:
    """Put one on PATH that prints these lines."""
    program = environment.programs / "nvidia-smi"
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines) + f"exit {code}\n")
    program.chmod(0o755)


def pins(lock: str) -> dict[str, str]:
    """A lock file's packages."""
    lines = (ROOT / "requirements" / lock).read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
