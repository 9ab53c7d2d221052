"""Inside a box: answers commands until the other end closes."""

from __future__ import annotations

import os
import site
import sys

from megatron_r1.reward.sandbox.inside.channel import Channel
from megatron_r1.reward.sandbox.inside.process import Leave

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

COMMANDS = {
    "load": ("programs", "load"),
    "run": ("programs", "run"),
    "answer": ("callee", "answer"),
    "judge": ("caller", "judge"),
}
"""Module and function of each command (`do`). It gets the channel and the other keys, and returns the reply."""


def main() -> None:
    """Serve; in a process that a command has started, run what that process is for."""
    if len(sys.argv) > 1:
        _function("confine", "confine")(bytes.fromhex(sys.argv[1]))
    site.setquit()  # exit() and quit(), which `python -S` leaves out
    try:
        _serve()
    except Leave as leave:
        body = leave.body
    else:
        return
    body()


def _serve() -> None:
    channel = Channel()
    _function("programs", "run")  # before the job comes
    channel.send({"ready": os.getpid()})
    for command in channel:
        answer = _function(*COMMANDS[command.pop("do")])
        channel.send(answer(channel, **command))


def _function(module: str, name: str) -> Any:
    __import__(f"{__package__}.{module}")
    return getattr(sys.modules[f"{__package__}.{module}"], name)
