"""Inside a box: commands in, replies out.

Commands are trusted and come as `marshal`, which needs no import; replies are not, and go as JSON. The packages
`json`, `typing`, `enum` and their like would double the time in which a box starts, so the modules that every box needs
do without.
"""

from __future__ import annotations

import marshal
import os
from _json import encode_basestring_ascii

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any


class Channel:
    """Frames over the standard input that the box was started with, lines over its standard output.

    Both are moved away from their descriptors at once: programs get pipes of their own in these places.
    """

    def __init__(self) -> None:
        os.closerange(3, 65536)  # what bwrap left open
        self.commands, self.replies = os.dup(0), os.dup(1)
        nothing = os.open("/dev/null", os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        os.close(nothing)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Commands until the other end closes."""
        while (command := self.receive()) is not None:
            yield command

    def receive(self) -> dict[str, Any] | None:
        """The next command; None when the other end is closed."""
        size = self._read(4)
        data = size and self._read(int.from_bytes(size, "big"))
        command: dict[str, Any] | None = marshal.loads(data) if data else None
        return command

    def send(self, reply: dict[str, Any]) -> None:
        """Answer."""
        left = memoryview(to_json(reply).encode() + b"\n")
        while left:
            left = left[os.write(self.replies, left) :]

    def _read(self, size: int) -> bytes | None:
        pieces = []
        while size:
            pieces.append(os.read(self.commands, min(size, 1 << 20)))
            if not pieces[-1]:
                return None
            size -= len(pieces[-1])
        return b"".join(pieces)


def to_json(value: Any) -> str:
    """As `json.dumps`, of dicts with text as keys, lists, text, numbers, truth values and None."""
    if value is None or value is True or value is False:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return encode_basestring_ascii(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{encode_basestring_ascii(key)}:{to_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(to_json, value)) + "]"
    return repr(value)
