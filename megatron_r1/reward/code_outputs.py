"""Whether a program printed what was expected."""

import math
from itertools import zip_longest


def same_output(printed: str, expected: str, tolerance: float | None = None) -> bool:
    """All lines are the same up to white space at their ends, and empty lines at the end of the text.

    Args:
        printed: what the program wrote.
        expected: what the test says.
        tolerance: when given, tokens are compared instead of lines, and two finite numbers are the same when they
            differ by at most this, absolutely or relative to the expected one.
    """
    ours, theirs = _lines(printed), _lines(expected)
    if ours == theirs or tolerance is None:
        return ours == theirs
    return len(ours) == len(theirs) and all(
        _same_token(token, wanted, tolerance)
        for line, wanted_line in zip(ours, theirs, strict=True)
        for token, wanted in zip_longest(line.split(), wanted_line.split(), fillvalue="")
    )


def same_first_lines(printed: str, expected: str) -> bool:
    """The comparison of open-r1's `code_reward`: only as many lines as the shorter text has are looked at.

    So the right first line is enough, and no output at all passes where the first expected line is blank.
    """
    lines = zip(printed.strip().split("\n"), expected.strip().split("\n"), strict=False)
    return all(line.strip() == wanted.strip() for line, wanted in lines)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _same_token(token: str, wanted: str, tolerance: float) -> bool:
    if token == wanted:
        return True
    number, target = _number(token), _number(wanted)
    return number is not None and target is not None and abs(number - target) <= tolerance * max(1, abs(target))


def _number(token: str) -> float | None:
    if not token.isascii() or "_" in token:  # float() reads digits of any script, and 1_000
        return None
    try:
        number = float(token)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
