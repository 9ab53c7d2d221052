r"""What an answer claims: the contents of its boxes, or the expressions that its text states.

A text that hedges claims several things, and all of them are kept: an answer is right only where all it claims is
right. Everything here is linear in the length of the text.
"""

import re
import unicodedata
from functools import cache

MAX_CLAIMS = 20
"""More than these are an enumeration, not an answer."""

MAX_SENTENCE = 500
"""Characters around an expression that nothing sets off from them."""

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_ANCHOR = re.compile(r"(?i)\banswer\b[\s*]*(?:is|are|:|=)[\s:*]*|答案(?:是|为|:|：)\s*|####\s*")
_MATH = re.compile(r"\$\$([^$]+)\$\$|\$([^$]+)\$|\\\(((?:(?!\\[()]).)+)\\\)|\\\[((?:(?!\\[\[\]]).)+)\\\]", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.\\^{/])[-+−]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[/:]\d+(?:\.\d+)?)?(?:\s?%)?(?![\w/^])")
_DIGIT = re.compile(r"(?<![A-Za-z][\^_])(?<![A-Za-z][\^_]\{)(?<!\d)\d")
_HEDGE = re.compile(r"(?i)\b(?:or|either|neither|nor|not|never|cannot|maybe|perhaps|unless)\b|n't\b|≠|\\neq?\b|__")
_COMMAND = re.compile(
    r"\\(?:begin|end)\s*\{[a-z]*\}|\\(?:angle|triangle|overline)\s*\{?[A-Z]{1,4}(?![A-Za-z])|\\[A-Za-z]+"
)
_SUBJECT = re.compile(r"(?:\$[^$\d]+\$|\\\((?:(?!\\[()])\D)+\\\))(?=\s+(?:is|are|equals)\b)")
_LEAD = re.compile(
    r"[A-Za-z ,'-]*\b(?:is|are|equals|be)(?: (?:at|about|approximately|exactly|equal to))?:?\s+(?=\S)|[Aa]n? (?=\d)"
)
_TAIL = re.compile(r"(?:\s+[A-Za-z]{2,})+$")
_DOLLAR = re.compile(r"(?<!\\)\\\$")
_AFTER_FORMULA = re.compile(
    r"(?<=[a-z])\s*\$\s*\^\s*\{?\s*-?\d\s*\}?\s*\$|(?<=\$)\s*(?:[ckm]?m|kg|ft|in)(?=\s*\.?\s*$)"
)
"""Of a unit: the exponent of `$36$ cm$^2$`, and one that a short unit's name has at the end."""
_WORD = re.compile(r"[^\W\d_]{3,}|[\u3040-\u30ff\u4e00-\u9fff]|\b(?:an?s|at|be|in|is|it|no|of|so|to|we)\b")
_NO_PROSE = re.compile(
    r"a?(?:sin|cos|tan)h?|arc(?:sin|cos|tan)|cot|sec|csc|log|exp|sqrt|inf|infinity|and|mod|max|min|gcd|lcm|det|"
    r"alpha|beta|gamma|delta|theta|lambda|phi|psi|omega|sigma"
)
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it|sf)|mbox|operatorname)\s*\{([^{}]*)\}"
    r"(\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d))?"
)
_GLYPHS = {
    **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full-width forms of ASCII
    "\u00a0": " ", "\u2009": " ", "\u202f": " ", "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/",
    "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ", "∪": r"\cup ",
    "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "°": r"^\circ ", "²": "^2 ", "³": "^3 ", "½": r"\frac{1}{2}",
}  # fmt: skip
_LAYOUT = [
    (re.compile(r"\\(?:left|right|displaystyle|[bB]igg?[lr]?)(?![A-Za-z])|(?<!\\)\\[,!]"), ""),
    (re.compile(r"(?<!\\)\\[;: ]|\\q?quad(?![A-Za-z])|~|\s+"), " "),
    (re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])"), ""),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\([%$])"), r"\1"),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\\(le|ge)(?:q?slant|qq)(?![A-Za-z])"), r"\\\1"),
    (re.compile(r"\\[lr]?vert(?![A-Za-z])"), "|"),
    (re.compile(r"\\(?:lor|vee)(?![A-Za-z])"), ","),
    (re.compile(r"\\lbrace(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\dot\s*\{?(\d)\}?"), r"\\overline{\1}"),
    (re.compile(r"\\colon(?![A-Za-z])"), ":"),
    (re.compile(r"√\s*(?:\(([^()]*)\)|(\d+|[A-Za-z]))"), r"\\sqrt{\1\2}"),
    (re.compile(r"(?<=[\w)}])\*\*(?=\d|[({-])"), "^"),
    (re.compile(r"\{,\}"), ","),
]
_AT_LAST = [
    (re.compile(r"(?<=[\d}])\s+i(?![A-Za-z])"), "i"),
    (re.compile(r",(?:\s*,)+"), ","),
    (re.compile(r"(?<=\d)\s+to\s+(?=\d)"), ":"),
    (re.compile(r"\b(?:negative|minus)\s+(?=\d)"), "-"),
    (re.compile(r"\\\{\s*[A-Za-z]\s*(?:\\mid(?![a-z])|\||:)\s*([^{}|]+)\\\}"), r"\1"),  # {x | x > 2}
    (re.compile(r"(?<=.),?\s*\(?\s*[kn]\s*\\in\s*(?:\\mathbb\s*)?\{?\s*[ZN]\s*\}?\s*\)?\s*$"), ""),
]
"""What is done once `\\text` is gone."""
_PAIRS = [("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")]


def boxes(text: str) -> list[str] | None:
    r"""What stands in each outermost `\boxed{...}` (or `\fbox`), in order; None where a box has no end."""
    found, position = [], 0
    while box := _BOX.search(text, position):
        end = _closing(text, box.end())
        if end is None:
            return None
        found.append(text[box.end() + 1 : end].strip())
        position = end
    return found


def claims(text: str, boxed_only: bool = False) -> tuple[str, ...]:
    """The different things that `text` states as its answer, in tidy LaTeX; none where it evades or breaks off.

    Boxes have priority. Without one, an answer is the whole text where that is an expression, otherwise each formula
    and number in the prose behind the first "answer is".
    """
    found = boxes(text)
    if found is None or (boxed_only and not found):
        return ()
    stated = [_stated(part) for part in found or [after_anchor(text)]]
    if not all(stated):
        return ()
    unique = tuple(dict.fromkeys(claim for part in stated for claim in part))
    return unique if len(unique) <= MAX_CLAIMS else ()


def after_anchor(text: str) -> str:
    """What follows the first "answer is" (or "answer:", "####", and in Chinese), or the whole text."""
    anchor = _ANCHOR.search(text)
    return text[anchor.end() :] if anchor else text


def tidy(text: str) -> str:
    r"""One spelling of LaTeX: no layout commands, ASCII for what only looks different, no `\text` around units."""
    text = _undressed("".join(_glyph(character) for character in text))
    for pattern, replacement in _LAYOUT:
        text = pattern.sub(replacement, text)
    alone = _TEXT.fullmatch(text.strip())
    text = alone[1] if alone and not alone[2] else _TEXT.sub(_unwrapped, text)
    for pattern, replacement in _AT_LAST:
        text = pattern.sub(replacement, text)
    return _undressed(text)


def _stated(part: str) -> list[str]:
    if _BOX.search(part):
        return []
    part = _AFTER_FORMULA.sub("", _DOLLAR.sub("", part))
    expression = tidy(part)
    if not _is_prose(expression):
        return [expression] if expression else []
    if _HEDGE.search(part):
        return []
    if len(expression) <= MAX_SENTENCE and (bare := _without_words(expression)):
        return [bare]
    part = _SUBJECT.sub("", part)
    formulas = [tidy("".join(groups)) for groups in _MATH.findall(part)]
    outside = _MATH.sub(" ", part)
    if _COMMAND.search(_TEXT.sub(" ", outside)):
        return []  # formulas that nothing sets off from the prose
    if _DIGIT.search(_NUMBER.sub(" ", outside)):
        return []  # a number that is part of something else
    return [claim for claim in formulas + [tidy(number) for number in _NUMBER.findall(outside)] if claim]


def _without_words(text: str) -> str:
    r"""`The area is 4\pi square units` as `4\pi`; nothing where more than words stand around an expression."""
    lead = _LEAD.match(text)
    rest = text[lead.end() :] if lead else text
    tail = _TAIL.search(rest)
    if tail and not any(_NO_PROSE.fullmatch(word.lower()) for word in tail[0].split()):
        rest = rest[: tail.start()]
    rest = tidy(rest)
    return "" if _is_prose(rest) else rest


def _is_prose(text: str) -> bool:
    return any(not _NO_PROSE.fullmatch(word.lower()) for word in _WORD.findall(_COMMAND.sub(" ", text)))


def _undressed(text: str) -> str:
    before = None
    while text != before:
        before = text
        text = text.strip().rstrip(".;,:").strip().strip('*`"') if not text.endswith(r"\.") else text
        for left, right in _PAIRS:
            inner = text[len(left) : -len(right)]
            if len(text) > len(left + right) and text.startswith(left) and text.endswith(right) and left not in inner:
                text = inner
    return text.strip("$€£¥") if text.count("$") <= 1 else text


def _unwrapped(match: re.Match[str]) -> str:
    inner = match[1].strip()
    if inner.lower() in {"and", "or", "", ",", ";"}:
        return "," if inner else " "
    if inner.lower() == "to":
        return " to "
    if len(inner) == 1 or _HEDGE.search(inner) or any(character.isdigit() for character in inner):
        return f" {inner} {match[2] or ''}"
    return " "  # a unit, or a word that explains


@cache
def _glyph(character: str) -> str:
    if character in _GLYPHS or character.isascii():
        return _GLYPHS.get(character, character)
    script, _, letter = unicodedata.name(character, "").partition(" SMALL LETTER ")
    return f"\\{letter.lower()} " if script == "GREEK" and letter.isalpha() else character


def _closing(text: str, opening: int) -> int | None:
    """Where the brace that opens at `opening` is closed."""
    if text[opening : opening + 1] != "{":
        return None
    depth = 0
    for brace in _BRACE.finditer(text, opening):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return brace.start()
    return None
