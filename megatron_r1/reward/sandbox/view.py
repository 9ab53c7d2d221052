"""What of the machine can be seen from a box by bubblewrap: programs, libraries, Python's standard library. No more.

`PYTHON` is where Python's folder is to be found in a box, wherever it is outside: a home directory, conda, uv.
"""

import functools
import platform
import sys
import sysconfig
from pathlib import Path

from megatron_r1.reward.sandbox.bundle import BOOT

READ_ONLY = ("/usr/bin", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libexec", "/usr/include")
LINKED = ("/bin", "/lib", "/lib32", "/lib64")
"""Links into /usr on most systems, folders on some."""
ETC = ("/etc/ld.so.cache", "/etc/alternatives")
DEVICES = ("/dev/null", "/dev/random", "/dev/urandom")
"""Not /dev/zero: a shared mapping of it is memory that no limit counts."""
FOLDERS = ("/usr", "/etc", "/dev", "/python", "/python/bin")
PYTHON = Path("/python")
TMP = "/tmp"


@functools.cache
def file_system() -> tuple[str, ...]:
    """Options of bwrap for all but /tmp."""
    options: list[str] = []
    for path in FOLDERS:
        options += ["--dir", path]
    for path in (*READ_ONLY, *ETC):
        options += ["--ro-bind-try", path, path]
    for folder in map(Path, LINKED):
        if folder.is_symlink():
            options += ["--symlink", str(folder.readlink()), str(folder)]
        elif folder.exists():
            options += ["--ro-bind", str(folder), str(folder)]
    options += _python_folder()
    options += ["--proc", "/proc", "--remount-ro", "/proc"]
    for path in DEVICES:
        options += ["--dev-bind", path, path]
    for name, target in (("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2"), ("fd", "fd")):
        options += ["--symlink", f"/proc/self/{target}", f"/dev/{name}"]
    return (*options, "--symlink", TMP, "/dev/shm")  # so that semaphores count as files of the box


def python_command() -> list[str]:
    """The interpreter in a box: isolated, without site-packages, in UTF-8."""
    folder = PYTHON if _is_elsewhere() else Path(sys.base_prefix)
    return [str(folder / "bin" / _interpreter().name), "-I", "-S", "-B", "-X", "utf8", "-c", BOOT]


def environment() -> dict[str, str]:
    """All of it."""
    base = {"PATH": "/usr/bin:/bin", "HOME": TMP, "LANG": "C.UTF-8"}
    return base | ({"LD_LIBRARY_PATH": str(PYTHON / "lib")} if _is_elsewhere() else {})


def _is_elsewhere() -> bool:
    return Path(sys.base_prefix) != Path("/usr")


def _interpreter() -> Path:
    named = Path(sys.base_prefix, "bin", "python" + ".".join(platform.python_version_tuple()[:2]))
    return named if named.exists() else Path(sys.executable).resolve()


def _python_folder() -> list[str]:
    """Python's libraries, less the packages that are installed in them."""
    options: list[str] = []
    if _is_elsewhere():
        program = _interpreter()
        options += ["--ro-bind", str(program), str(PYTHON / "bin" / program.name)]
        for name in dict.fromkeys(("lib", sys.platlibdir)):
            options += ["--ro-bind", str(Path(sys.base_prefix, name)), str(PYTHON / name)]
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    for packages in {Path(sysconfig.get_path(kind, vars=base)) for kind in ("purelib", "platlib")}:
        if packages.is_dir():
            inside = PYTHON / packages.relative_to(sys.base_prefix) if _is_elsewhere() else packages
            options += ["--tmpfs", str(inside), "--remount-ro", str(inside)]
    return options
