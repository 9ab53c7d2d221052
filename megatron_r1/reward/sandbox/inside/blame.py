"""Inside a box: an exception in a line, without the time that importing `traceback` takes."""

MOST = 1000
"""Characters of the message."""


def blame(error: BaseException, file: str) -> str:
    """What was raised, and the line of `file` that it came through last."""
    text = message(error)
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == file:
            line = trace.tb_lineno
        trace = trace.tb_next
    place = f"{file}, line {line}: " if line else ""
    return f"{place}{type(error).__name__}{': ' if text else ''}{text}"


def message(error: BaseException) -> str:
    """The exception's text, as far as it can be had: that of a program's own class may raise."""
    try:
        return str(error)[:MOST]
    except BaseException:
        return ""
