"""Prompts of judges: TOML files with `user`, and `system` if wanted, with places such as `{question}` in them."""

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

from megatron_r1.errors import ConfigError

FOLDER = Path(__file__).parent / "prompts"
Messages = list[dict[str, str]]
"""Of a chat: `[{"role": "system", "content": ...}, {"role": "user", "content": ...}]`."""


class Prompt:
    """A prompt with places for texts.

    Args:
        path: the file; None = the package's own.
        default: name of the package's own.
        fields: the places, each of which has to stand in `user`.

    Raises:
        ConfigError: no such file, not TOML, other keys, or a place is missing.
    """

    def __init__(self, path: str | None, default: str, fields: Sequence[str]) -> None:
        self.path = Path(path).expanduser() if path is not None else FOLDER / f"{default}.toml"
        self.texts = _read(self.path)
        self._places = re.compile("|".join(re.escape(f"{{{field}}}") for field in fields))
        self._tags = re.compile("|".join(map(re.escape, set(re.findall(r"</\w+>", self.texts["user"])))) or "(?!)")
        for field in fields:
            if f"{{{field}}}" not in self.texts["user"]:
                raise ConfigError(f"{self.path}: `user` has no place for {{{field}}}; it needs {', '.join(fields)}")

    def messages(self, **texts: str) -> Messages:
        """The chat with `texts` in their places.

        A text is never searched for places, and cannot close the block of the prompt that it stands in.
        """
        safe = {f"{{{field}}}": self._tags.sub(lambda tag: f"< {tag[0][1:]}", text) for field, text in texts.items()}
        user = self._places.sub(lambda place: safe[place[0]], self.texts["user"])
        system = [{"role": "system", "content": self.texts["system"]}] if "system" in self.texts else []
        return [*system, {"role": "user", "content": user}]


def _read(path: Path) -> dict[str, str]:
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the prompt {path}: {error.strerror}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise ConfigError(f"the prompt {path} is not valid TOML: {error}") from error
    if "user" not in tree or set(tree) - {"user", "system"} or not all(isinstance(text, str) for text in tree.values()):
        raise ConfigError(f"the prompt {path} has {sorted(tree)}; it needs the text `user`, and may have `system`")
    return {role: text.strip() for role, text in tree.items()}
