"""Inside a box: one program, then runs of it, each in a process of its own with a text as standard input."""
# ruff: noqa: PTH108, PTH109, PTH116, PTH123
# pathlib would slow the start of every box.

from __future__ import annotations

import atexit
import gc
import io
import os
import sys

from megatron_r1.reward.sandbox.inside import process
from megatron_r1.reward.sandbox.inside.channel import Channel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any, NoReturn

COMPILER = ("/usr/bin/g++", "/usr/local/bin/g++")
COMPILE = ("-O2", "-std=c++17", "-pipe", "-o", "program", "main.cpp")
COMPILER_LIMITS = {"memory_mib": 2048, "file_mib": 64, "output_kib": 64, "processes": 32, "files": 256}
PRELOADED = (
    "bisect",
    "collections",
    "copy",
    "dataclasses",
    "datetime",
    "decimal",
    "enum",
    "fractions",
    "functools",
    "heapq",
    "itertools",
    "json",
    "math",
    "operator",
    "random",
    "re",
    "statistics",
    "string",
    "typing",
)
"""Modules that are imported once a program that mentions them, rather than once a run."""


class Loaded:
    """The program of this box; a box has only one."""

    language = "python"
    source = ""
    limits: dict[str, Any] = {}


def load(channel: Channel, language: str, source: str, limits: dict[str, Any]) -> dict[str, Any]:
    """Take a program, compile it if its language needs that; `status` is ok, compile_error or no_compiler."""
    Loaded.language, Loaded.source, Loaded.limits = language, source, limits
    with open("main.cpp" if language == "cpp" else "main.py", "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(source)
    if language == "cpp":
        return _compile(channel)
    for module in PRELOADED:
        if module in source:
            __import__(module)
    gc.freeze()  # what is there now need not be looked through, and so copied, in each run
    return {"status": "ok"}


def run(channel: Channel, text: str) -> dict[str, Any]:
    """Run the program once; `fresh` says whether it left the box as it was."""
    try:
        stdin = _file(text.encode("utf-8", "surrogatepass"))
    except OSError as error:
        return {"status": "failed", "stdout": "", "stderr": f"the input: {error}", "fresh": False}
    files = _state()
    child = process.start(_body, Loaded.limits, stdin)
    os.close(stdin)
    reply = process.collect(child, Loaded.limits, channel.commands)
    reply["fresh"] = files is not None and _state() == files
    return reply


def python(source: str, path: str) -> NoReturn:
    """In a new process: execute Python and end as `python3 path` does."""
    main = type(sys)("__main__")
    prepare_python(main, path)
    code = 0
    try:
        exec(compile(source, path, "exec", dont_inherit=True), main.__dict__)  # noqa: S102 - what a box is for
    except SystemExit as leaving:
        code = _exit_code(leaving.code)
    except BaseException as error:
        code = 1
        error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next  # less this function's frame
        sys.excepthook(type(error), error, error.__traceback__)
    os._exit(_finalize(main.__dict__) or code)


def _exit_code(said: object) -> int:
    if said is None or isinstance(said, int):
        return int(said or 0) & 255
    print(said, file=sys.stderr)
    return 1


def _finalize(namespace: dict[str, Any]) -> int:
    """What an interpreter does at its end, less taking its modules apart, which takes longer than small programs.

    Threads end, exit functions run, what files hold is written, global objects are let go of.

    Returns:
        The exit code where the standard streams cannot be written, else 0.
    """
    if threading := sys.modules.get("threading"):
        threading._shutdown()
    atexit._run_exitfuncs()
    for name in sorted(namespace, key=lambda name: not str(name).startswith("_")):
        if name != "__builtins__":
            namespace[name] = None
    written = _flush(sys.stdout) & _flush(sys.stderr)
    for kind in (io.TextIOWrapper, io.BufferedWriter):
        for thing in gc.get_objects():
            if issubclass(type(thing), kind):
                _flush(thing)
    gc.collect()
    return 0 if written else 120


def _flush(stream: Any) -> bool:
    try:
        if stream is not None and not stream.closed:
            stream.flush()
    except Exception:  # it may be the program's own
        return False
    return True


def prepare_python(main: ModuleType, path: str) -> None:
    """Make `main` the module that is executed, and remove what the box has that an interpreter has not."""
    del sys.meta_path[0]  # the bundle that the box's own modules come from
    for module in [module for module in sys.modules if module.partition(".")[0] == "megatron_r1"]:
        del sys.modules[module]
    sys.modules["__main__"] = main
    main.__dict__.update(__file__=path, __builtins__=sys.modules["builtins"])
    sys.argv = [path]
    sys.path.insert(0, os.getcwd())
    streams = {
        "stdin": open(0, encoding="utf-8", errors="surrogateescape", closefd=False),  # noqa: SIM115
        "stdout": open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False),  # noqa: SIM115
        "stderr": open(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False),  # noqa: SIM115
    }
    for name, stream in streams.items():
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def execute(arguments: list[str]) -> None:
    """In a new process: become another program."""
    import signal

    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    os.execve(arguments[0], arguments, {"PATH": "/usr/bin:/bin", "HOME": os.getcwd(), "LANG": "C.UTF-8"})


def _body() -> None:
    execute(["./program"]) if Loaded.language == "cpp" else python(Loaded.source, "main.py")


def _compile(channel: Channel) -> dict[str, Any]:
    compiler = next(filter(os.path.exists, COMPILER), None)
    if compiler is None:
        return {"status": "no_compiler"}
    seconds = Loaded.limits["compile_seconds"]
    limits = Loaded.limits | COMPILER_LIMITS | {"cpu_seconds": seconds, "wall_seconds": seconds}
    nothing = os.open("/dev/null", os.O_RDONLY)
    child = process.start(lambda: execute([compiler, *COMPILE]), limits, nothing)
    os.close(nothing)
    reply = process.collect(child, limits, channel.commands)
    if reply["status"] != "ok":
        reply["stderr"] += "the compiler was over its limits\n" if reply["status"] != "failed" else ""
        reply["status"] = "compile_error"
    return reply


def _file(content: bytes) -> int:
    """A file without a name, open for reading: programs may ask for its size, or map it."""
    with open("stdin", "wb") as file:
        file.write(content)
    fd = os.open("stdin", os.O_RDONLY)
    os.unlink("stdin")
    return fd


def _state() -> dict[str, Any] | None:
    """What is in the writable folder; None when it cannot be told."""
    try:
        with os.scandir(".") as entries:
            found = {entry.name: entry.stat(follow_symlinks=False) for entry in entries}
        return {name: (stat.st_ino, stat.st_ctime_ns) for name, stat in (found | {".": os.stat(".")}).items()}
    except OSError:
        return None
