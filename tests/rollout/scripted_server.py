"""The other side of our protocol without vLLM: a server that answers by rule, and goes wrong when it is told to.

    python scripted_server.py <port> <folder>

A response is a function of its seed and of the weights: `[weights, seed % 50 + 3, ..., 2]`; one that is under way when
all is cut comes as its first half. What was asked is in `<folder>/<port>.asked`; a file `<folder>/<port>.fault`
(`{"kind": ..., "after": responses}`) breaks the next request. With the kind "hold" a response waits until there is no
file `<folder>/<port>.hold`.
"""

import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

SECONDS = 0.01
"""Between two responses of a request."""


def length(seed: int) -> int:
    """Tokens of a response."""
    return 2 + seed % 7


def response(seed: int, weights: int, longest: int) -> dict[str, Any]:
    """What every engine with these weights says."""
    tokens = [weights, *[seed % 50 + 3] * (length(seed) - 2), 2][:longest]
    stopped = tokens[-1] == 2
    return {"tokens": tokens, "logprobs": [-0.5] * len(tokens), "finish_reason": "stop" if stopped else "length"}


def first_half(tokens: list[int]) -> dict[str, Any]:
    """What there is of a response when it is cut."""
    half = tokens[: len(tokens) // 2]
    return {"tokens": half, "logprobs": [-0.5] * len(half), "finish_reason": "abort"}


def broken(kind: str, answer: dict[str, Any]) -> dict[str, Any]:
    """A response that no working engine gives; one that was held is as all others."""
    changes: dict[str, dict[str, Any]] = {
        "nan": {"logprobs": [float("nan")] * len(answer["tokens"])},
        "few_logprobs": {"logprobs": answer["logprobs"][1:]},
        "no_tokens": {"tokens": [], "logprobs": []},
        "too_long": {"tokens": [5] * 99 + [2], "logprobs": [-1.0] * 100},
        "unfinished": {"finish_reason": "timeout"},
        "aborted": {"tokens": [5], "logprobs": [-1.0], "finish_reason": "abort"},
        "early_end": {"tokens": [5, 5], "logprobs": [-1.0, -1.0], "finish_reason": "stop"},
        "old_weights": {"weight_versions": ["-1" if answer["weight_versions"] == ["0"] else "0"]},
        "other_sample": {"sample": answer["sample"] + 1000},
        "positive": {"logprobs": [0.5] * len(answer["tokens"])},
        "hold": {},
    }
    return answer | changes[kind]


class Engine:
    """What the server remembers."""

    def __init__(self, port: int, folder: Path) -> None:
        self.token = os.environ.get("MEGATRON_R1_ENGINE_TOKEN", "")
        self.fault = folder / f"{port}.fault"
        self.asked = folder / f"{port}.asked"
        self.hold = folder / f"{port}.hold"
        self.weights, self.version = 0, "0"
        self.hung = threading.Event()
        self.coreless = False
        """Its core has died, so it is not healthy; calls that the core had stay open."""
        self.cut = threading.Event()
        """All responses end where they are."""
        self.asleep = False
        self.taking = threading.Lock()

    def take_fault(self) -> dict[str, Any]:
        """The fault of this request; requests come side by side."""
        with self.taking:
            return self._take_fault()

    def _take_fault(self) -> dict[str, Any]:
        if not self.fault.exists():
            return {}
        fault: dict[str, Any] = json.loads(self.fault.read_text())
        if fault.get("times", 1) > 1:
            self.fault.write_text(json.dumps(fault | {"times": fault["times"] - 1}))
        elif "then" in fault:
            self.fault.write_text(json.dumps(fault["then"]))
        else:
            self.fault.unlink()
        return fault


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    engine: Engine

    def do_GET(self) -> None:
        path = urlparse(self.path).path
        if self.engine.hung.is_set():
            time.sleep(600)
        if path == "/health":
            self.answer(503 if self.engine.coreless else 200, {})
        elif self.allowed():
            self.answer(200, {"weight_version": self.engine.version})

    def do_POST(self) -> None:
        parsed, size = urlparse(self.path), int(self.headers.get("content-length", 0))
        path = parsed.path
        body = json.loads(self.rfile.read(size) or b"{}")
        if self.engine.hung.is_set():
            time.sleep(600)
        if not self.allowed():
            return
        if path in ("/sleep", "/wake_up"):
            self.engine.asleep = path == "/sleep"
            with self.engine.asked.with_suffix(".slept").open("a") as file:
                file.write(f"{path}\n")
        elif self.engine.asleep:
            self.answer(500, {"error": "asleep"})
            return
        if path == "/megatron_r1/sample":
            self.sample(body)
            return
        if path == "/pause" and parsed.query == "mode=abort":
            self.engine.cut.set()
        if path == "/resume":
            self.engine.cut.clear()
        if path == "/update_weights":
            file = Path(body["update_info"]["path"])
            self.engine.weights = int((file / "weights" if file.is_dir() else file).read_text())
            with self.engine.asked.with_suffix(".loaded").open("a") as file:
                file.write(f"{self.engine.weights}\n")
        if path == "/finish_weight_update":
            self.engine.version = body["weight_version"]
        if path == "/update_weight_version":
            self.engine.version = body["new_version"]
        if path == "/start_weight_update" and (fault := self.engine.take_fault()):
            self.stop(fault["kind"])
        self.answer(200, {"success": True})

    def sample(self, body: dict[str, Any]) -> None:
        """Our route."""
        fault, engine = self.engine.take_fault(), self.engine
        with engine.asked.open("a") as file:
            file.write(json.dumps({key: body[key] for key in ("prompts", "seeds", "max_tokens", "together")}) + "\n")
        self.send_response(fault.get("status", 200))
        self.end_headers()
        left, cut = fault.get("after", -1), False
        for prompt, seeds in enumerate(body["seeds"]):
            for sample, seed in enumerate(seeds):
                while left == 0 and fault["kind"] == "hold" and engine.hold.exists():
                    time.sleep(0.01)
                longest, version = body["max_tokens"][prompt], engine.version
                begun = {} if cut else response(seed, engine.weights, longest)
                if begun and not engine.cut.wait(fault.get("seconds", SECONDS)):
                    said, version = response(seed, engine.weights, longest), engine.version
                else:
                    said, cut = first_half(begun.get("tokens", [])), True
                line = {"prompt": prompt, "sample": sample, **said, "weight_versions": [version] * bool(said["tokens"])}
                if left == 0 and self.stop(fault["kind"]):
                    return
                text = json.dumps(broken(fault["kind"], line) if left == 0 else line)
                self.wfile.write(text.encode() + b"\n{}\n")
                left -= 1

    def stop(self, kind: str) -> bool:
        """Faults that leave no answer; is the request over?"""
        if kind == "die":
            os._exit(1)
        if kind == "hang":
            self.engine.hung.set()
            time.sleep(600)
        if kind == "core_dies":
            self.engine.coreless = True
            time.sleep(600)
        if kind == "wait":  # until somebody takes the file away
            here = self.engine.asked.with_suffix(".waits")
            here.touch()
            while here.exists():
                time.sleep(0.01)
        if kind == "malformed":
            self.wfile.write(b'{"prompt": 0, "sam\n')
        if kind == "error":
            self.wfile.write(b'{"error": "RuntimeError: the core is broken"}\n')
        return kind in ("malformed", "error", "cut")

    def allowed(self) -> bool:
        """Is the token right?"""
        right = self.headers.get("authorization") == f"Bearer {self.engine.token}"
        if not right:
            self.answer(401, {})
        return right

    def answer(self, status: int, body: dict[str, Any]) -> None:
        """All at once."""
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: object) -> None:
        """Silence."""


def main() -> None:
    Handler.engine = Engine(int(sys.argv[1]), Path(sys.argv[2]))
    ThreadingHTTPServer.request_queue_size = 256
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()


if __name__ == "__main__":
    main()
