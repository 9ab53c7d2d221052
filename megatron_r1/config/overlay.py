"""One table of a run file laid over another. It imports nothing, so that the doctor can use it."""

from typing import Any


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid over `under`: tables are merged key by key, everything else is replaced.

    A table whose `type` becomes another one is replaced as a whole: the keys of one component mean nothing to another.
    """
    merged = dict(under)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and value.get("type", old.get("type")) == old.get("type"):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged
