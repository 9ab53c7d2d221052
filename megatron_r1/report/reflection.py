"""Words by which a model reflects on its own answer, the sign of the R1-Zero "aha moment"."""

import re

REFLECTIVE_WORDS = ("wait", "mistake", "however", "but", "retry", "error", "verify", "wrong", "evaluate", "check")
"""The list of DeepSeek-R1, appendix C (self-evolution of R1-Zero)."""

_PATTERN = re.compile(rf"\b(?:{'|'.join(REFLECTIVE_WORDS)})\b", re.IGNORECASE)


def reflective_words(text: str) -> int:
    """How often reflective words occur in `text`: whole words, in any case ("but", not "butter").

    The metric `reflective_words` is 1000 times the mean of this over a rollout's responses.
    """
    return sum(1 for _ in _PATTERN.finditer(text))
