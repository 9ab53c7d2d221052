"""Plain values as JSON, for the two boxes of a check; standard library only, because it runs inside them.

JSON's own types stand for themselves; the rest, non-finite floats among them, are objects with one tag, such as
`{"tuple": [...]}`. Decoding makes exact built-in types and nothing else: a value brings no behaviour of its sender's.
"""

from collections.abc import Callable
from typing import Any

MAX_DEPTH = 100
_JSON_INTEGERS = range(-(2**63), 2**63)
"""Longer ones go as hexadecimal text: Python refuses to convert long decimal ones."""
_COLLECTIONS: dict[str, type] = {"tuple": tuple, "set": set, "frozenset": frozenset}


class NotPlainError(ValueError):
    """What cannot be sent, or what was sent is no value."""


def encode(value: Any, handle: Callable[[Any], int], depth: int = MAX_DEPTH) -> Any:
    """`value` as a JSON tree; an object that is not plain becomes the number that `handle` gives it.

    Instances of subclasses of built-in types are sent as these types.

    Raises:
        NotPlainError: nested deeper than `depth`.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        number = int.__int__(value)
        return number if number in _JSON_INTEGERS else {"int": hex(number)}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        real = float.__float__(value)
        return real if real - real == 0 else {"float": repr(real)}
    if isinstance(value, complex):
        return {"complex": repr(complex.__complex__(value))}
    if isinstance(value, bytes | bytearray):
        return {"bytes": bytes(value).hex()}
    if not isinstance(value, list | tuple | set | frozenset | dict):
        return {"handle": handle(value)}
    if not depth:
        raise NotPlainError(f"a value is nested deeper than {MAX_DEPTH}")
    if isinstance(value, dict):
        pairs = dict.items(value)
        return {"dict": [[encode(key, handle, depth - 1), encode(item, handle, depth - 1)] for key, item in pairs]}
    items = [encode(item, handle, depth - 1) for item in value]
    if isinstance(value, list):
        return items
    return {next(tag for tag, kind in _COLLECTIONS.items() if isinstance(value, kind)): items}


def decode(tree: Any, handle: Callable[[int], Any]) -> Any:
    """The value of a JSON tree; `handle` gives the object for a number.

    Raises:
        NotPlainError: the tree stands for no value, whatever is wrong with it.
    """
    try:
        return _decode(tree, handle, MAX_DEPTH)
    except NotPlainError:
        raise
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise NotPlainError(f"not a value: {error}") from None


def _decode(tree: Any, handle: Callable[[int], Any], depth: int) -> Any:
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    if not depth:
        raise NotPlainError(f"a value is nested deeper than {MAX_DEPTH}")
    if isinstance(tree, list):
        return [_decode(item, handle, depth - 1) for item in tree]
    ((tag, content),) = tree.items()
    if tag == "int":
        return int(content, 16)
    if tag == "float":
        return float(content)
    if tag == "complex":
        return complex(content)
    if tag == "bytes":
        return bytes.fromhex(content)
    if tag == "handle":
        return handle(int(content))
    if tag == "dict":
        return {_decode(key, handle, depth - 1): _decode(item, handle, depth - 1) for key, item in content}
    return _COLLECTIONS[tag](_decode(item, handle, depth - 1) for item in content)
