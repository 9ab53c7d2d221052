"""Services: there when a stage needs them, gone afterwards, however the run ends."""

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.processes import outlive
from tests.recipe.conftest import Recipe, until

SERVER = """
import http.server, json, os, sys
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def log_message(self, *rest):
        pass
print(json.dumps({"pid": os.getpid(), "python": sys.executable, "arguments": sys.argv[2:]}), flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
"""


def free_port() -> int:
    for port in range(8800, 8820):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no free port")


@pytest.fixture
def served(recipe: Recipe) -> Recipe:
    """The second and the third stage need a judge, which reads what the first has kept."""
    (recipe.folder / "judge.py").write_text(SERVER)
    port = free_port()
    command = ["python", "judge.py", str(port), "@first/kept.jsonl"]
    recipe.tree["services"] = {"judge": {"command": command, "ready": f"http://127.0.0.1:{port}/health"}}
    recipe.tree["stages"]["second"]["services"] = recipe.tree["stages"]["third"]["services"] = ["judge"]
    return recipe


def starts(recipe: Recipe) -> list[dict[str, object]]:
    log = recipe.output / "logs/service-judge.log"
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")] if log.exists() else []


def gone(recipe: Recipe) -> bool:
    return not any(psutil.pid_exists(int(str(start["pid"]))) for start in starts(recipe))


def test_it_runs_for_stages_in_a_row(served: Recipe) -> None:
    assert served.ran("--only=first")["first"] == "ran"
    assert starts(served) == []
    served.run()
    [start] = starts(served)
    assert start["python"] == sys.executable
    assert start["arguments"] == [f"{served.output}/first/kept.jsonl"]
    assert gone(served)
    lineage = served.read("third/lineage.json")
    assert set(lineage["inputs"]) == {"first", "second"}
    assert "judge.py" in lineage["files"]
    assert served.ran()["third"] == "unchanged"
    assert len(starts(served)) == 1
    served.tree["services"]["judge"]["timeout"] = 99.0
    assert served.ran()["third"] == "unchanged"
    served.tree["services"]["judge"]["command"].append("other")
    assert served.ran() == {"first": "unchanged", "second": "ran", "third": "ran"}


@pytest.mark.parametrize(
    ("code", "timeout", "parts"),
    [
        ("print('no such model'); raise SystemExit(3)", 60.0, ["has ended", "no such model", "exited with code 3"]),
        ("import time; print('loading', flush=True); time.sleep(99)", 1.5, ["was not ready at http", "1.5 s", "load"]),
    ],
)
def test_it_does_not_get_ready(served: Recipe, code: str, timeout: float, parts: list[str]) -> None:
    (served.folder / "judge.py").write_text(code)
    served.tree["services"]["judge"]["timeout"] = timeout
    failed = served.run(code=1).stderr
    assert [part for part in ["megatron-r1 run: service judge", *parts] if part not in failed] == []
    assert served.states() == {"first": "done", "second": "not run", "third": "not run"}


def test_something_else_answers_in_its_place(served: Recipe) -> None:
    port = served.tree["services"]["judge"]["command"][2]
    with subprocess.Popen([sys.executable, "-c", SERVER, port], stdout=subprocess.PIPE) as other:
        assert other.stdout
        other.stdout.readline()
        failed = served.run(code=1).stderr
        other.kill()
    assert f"something answers at http://127.0.0.1:{port}/health already" in failed


@pytest.fixture
def waiting(served: Recipe) -> Recipe:
    """The second stage takes long."""
    served.tree["stages"]["second"] = {
        "verb": "data generate", "documents": 100_000, "quality": {"careful": 1.0}, "needs": ["first"],
        "services": ["judge"], "task": {"type": "reasoning_gym", "dataset": "chain_sum"},
    }  # fmt: skip
    del served.tree["stages"]["third"]
    return served


def test_one_that_dies_ends_the_stage(waiting: Recipe) -> None:
    process = waiting.start()
    until((waiting.output / "second/stage.json").exists, process)
    [start] = starts(waiting)
    psutil.Process(int(str(start["pid"]))).kill()
    assert process.wait(60) == 1
    assert "service judge has ended; the end of its log" in waiting.console()
    assert not list(Path(waiting.output / "second").glob("*.jsonl"))


def test_none_outlives_a_killed_run(
    waiting: Recipe, kill: Callable[["subprocess.Popen[bytes]"], list[psutil.Process]]
) -> None:
    process = waiting.start()
    until((waiting.output / "second/stage.json").exists, process)
    family = kill(process)  # the fixture fails if one of them stays
    [start] = starts(waiting)
    assert start["pid"] in {member.pid for member in family}
    outlive(family, 40)
    assert gone(waiting)
