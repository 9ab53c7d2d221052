"""The prose of a text: what is left of it without formulas, code, links and tags.

Formulas and code have no language, so nothing in them speaks for or against one. A sentence does not become a formula
by being written between dollar signs, though: four words in a row or more are found there too, and kept apart.
"""

import re
import unicodedata
from typing import NamedTuple

HIDDEN_WORDS = 4
"""So many words in a row are prose, even inside a formula, inline code or a name glued with underscores."""

CJK = "\u3005-\u3007\u3040-\u30fa\u30fc-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Han characters and kana, as the inside of a character class."""

_FENCE = re.compile(r"```(.*?)(?:```|\Z)", re.DOTALL)
_CODE_LINE = re.compile(r"[=(){}\[\];<>]|^\s*(?:import|from|return|else|try|pass|break|end)\b|:\s*$")
# No pattern looks twice for the end of a thing that never ends: what a policy writes must not take quadratic time.
_SPAN = re.compile(
    r"`[^`\n]+`"
    r"|\$\$(?:[^$]|\$(?!\$))+\$\$|\$[^$\n]+\$"
    r"|\\\[(?:(?!\\\[).)*?\\\]|\\\((?:(?!\\\().)*?\\\)"
    r"|\\begin\{(?P<name>(?:equation|align(?:ed)?|gather(?:ed)?|multline|split|array|cases|[bpvBV]?matrix)\*?)\}"
    r"(?:(?!\\begin\{(?P=name)\}).)*?\\end\{(?P=name)\}",
    re.DOTALL,
)
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_LINK = re.compile(r"(?:https?://|www\.)[!-~]+|\b[\w.+-]{1,64}@[\w.-]{1,255}")
TAG = re.compile(r"</?[a-zA-Z]\w*\s*/?>")
_LETTER, _GAP = r"[^\W\d_]", r"[\s,.;:'’\-{}]++"
_ROW = re.compile(
    rf"(?<!{_LETTER}){_LETTER}{{2,}}+(?:{_GAP}(?:{_LETTER}{_GAP})?{_LETTER}{{2,}}+){{{HIDDEN_WORDS - 1},}}+"
    rf"|[{CJK}，、。！？]{{6,}}+"
)
_INVISIBLE = {"Cf", "Mn"}
"""Unicode categories of zero-width characters and of marks stacked on letters."""


def normalised(text: str) -> str:
    """`text` as it looks: full-width and ornamental letters made plain, invisible and stacked marks removed."""
    if text.isascii():
        return text
    plain = unicodedata.normalize("NFKC", text)
    if len(plain) > 2 * len(text):  # ligatures that stand for whole sentences: a way to take our time, no way to write
        plain = unicodedata.normalize("NFC", text)
    return "".join(sign for sign in plain if sign.isascii() or unicodedata.category(sign) not in _INVISIBLE)


class Prose(NamedTuple):
    """The sentences of a text, normalised."""

    open: str
    """What stands outside of formulas, code, links and tags."""
    hidden: str
    """Sentences inside of formulas and inline code, and blocks of code that hold none."""


def prose(text: str) -> Prose:
    """Separate what is written in a language from what is not."""
    hidden: list[str] = []

    def without_code(match: re.Match[str]) -> str:
        lines = [line for line in match[1].splitlines()[1:] if line.strip()]
        code = sum(1 for line in lines if _CODE_LINE.search(line))
        if 3 * code < len(lines):
            hidden.extend(lines)
        return "\n"

    def without_formula(match: re.Match[str]) -> str:
        hidden.extend(row[0] for row in _ROW.finditer(_COMMAND.sub(" ", match[0])))
        return " "

    text = _SPAN.sub(without_formula, _FENCE.sub(without_code, normalised(text)))
    for pattern in (_COMMAND, _LINK, TAG):
        text = pattern.sub(" ", text)
    return Prose(text, "\n".join(hidden))
