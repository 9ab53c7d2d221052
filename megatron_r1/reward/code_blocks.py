"""Fenced blocks of code in Markdown, by CommonMark's rules for fences (0.31, section 4.5)."""

import re
from collections.abc import Iterator

# Possessive: a long line that is no fence after all must not be tried again at every length.
_FENCE = re.compile(r" {0,3}(`{3,}+|~{3,}+)([^`\n]*+)$")
_LABELS = {
    "python": {"python", "python3", "py"},
    "cpp": {"cpp", "c++", "cc", "cxx"},
}


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Label (first word, lower case, may be empty) and content of each block, in order; an unclosed one is none."""
    fence, label, content = "", "", list[str]()
    for line in text.split("\n"):
        match = _FENCE.match(line)
        if not fence:
            if match:
                fence, label, content = match[1], match[2].strip().lower().partition(" ")[0], []
        elif match and match[1].startswith(fence) and not match[2].strip():
            yield label, "\n".join(content) + "\n"
            fence = ""
        else:
            content.append(line)


def last_block(text: str, language: str, unlabelled: bool = True) -> str | None:
    """Content of the last block labelled with `language`, or (`unlabelled`) with nothing; None without one."""
    labels = _LABELS.get(language, {language}) | ({""} if unlabelled else set())
    found = None
    for label, content in blocks(text):
        if label in labels:
            found = content
    return found
