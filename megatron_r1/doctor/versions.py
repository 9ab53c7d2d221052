"""Versions of what is installed, from metadata alone."""

import platform
import re
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path


def installed(name: str) -> str | None:
    """The version of a distribution; None = it is not there. `python` is the interpreter."""
    if name == "python":
        return platform.python_version()
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def importable(module: str) -> bool:
    """Whether there is such a top-level module; it is not run."""
    return find_spec(module) is not None


def cuda_of_torch() -> str | None:
    """The CUDA that the installed torch was built for, such as "13.0"; None = none, or no torch."""
    spec = find_spec("torch")  # does not import it
    if spec is None or not spec.submodule_search_locations:
        return None
    for folder in spec.submodule_search_locations:
        file = Path(folder) / "version.py"
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        if found := re.search(r"^cuda(?::[^=]*)? = ['\"]([\d.]+)['\"]", text, re.MULTILINE):
            return found.group(1)
    return None
