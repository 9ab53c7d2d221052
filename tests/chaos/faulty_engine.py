"""Runs inside a vLLM server of these tests: an answer that a file asks for goes wrong.

vLLM loads it by `--middleware tests.chaos.faulty_engine.FaultyEngine`. A file `<folder>/<port>.fault`, the folder being
named by an environment variable, holds what is to be wrong with the next sample that is answered; then it is gone.
"""

import json
import os
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_r1.rollout.engine import SAMPLE_PATH

FOLDER_VARIABLE = "MEGATRON_R1_TEST_FAULTS"
ANSWERS = ("nan", "old_weights", "few_logprobs", "malformed", "error", "twice")


class FaultyEngine:
    """ASGI middleware around all others."""

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.folder = app, Path(os.environ[FOLDER_VARIABLE])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != SAMPLE_PATH:
            await self.app(scope, receive, send)
            return
        file = self.folder / f"{scope['server'][1]}.fault"

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.body" and file.exists():
                lines = message.get("body", b"").decode().splitlines(keepends=True)
                first = next((number for number, line in enumerate(lines) if '"tokens"' in line), None)
                if first is not None:
                    lines[first] = broken(file.read_text(), lines[first])
                    file.unlink()
                    message = {**message, "body": "".join(lines).encode()}
            await send(message)

        await self.app(scope, receive, sent)


def broken(kind: str, line: str) -> str:
    """A line that no working engine gives."""
    sample = json.loads(line)
    old = "-1" if sample["weight_versions"] == ["0"] else "0"
    changes: dict[str, dict[str, Any]] = {
        "nan": {"logprobs": [float("nan")] * len(sample["tokens"])},
        "few_logprobs": {"logprobs": sample["logprobs"][1:]},
        "old_weights": {"weight_versions": [old], "version_ends": [len(sample["tokens"])]},
    }
    whole = {
        "malformed": line[: len(line) // 2] + "\n",
        "error": json.dumps({"error": "RuntimeError: the core is broken"}) + "\n",
        "twice": line + line,
    }
    return whole[kind] if kind in whole else json.dumps(sample | changes[kind]) + "\n"
