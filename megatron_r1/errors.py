"""The errors a user can cause and mend; the command line prints them without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Says what is wrong, where, and what to do."""


class ConfigError(UserError, ValueError):
    """A run file or an override that cannot be used."""


class DataError(UserError, ValueError):
    """A data file, tokenizer or checkpoint that cannot be used."""


class EngineError(UserError, RuntimeError):
    """The rollout engine could not start, died, or does not match the trainer."""


class NumericsError(UserError, ArithmeticError):
    """A loss or gradient that is not finite; training on would destroy the weights."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`", did you mean 'x'?"` for the known name closest to `name`, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {match[0]!r}?" if match else ""
