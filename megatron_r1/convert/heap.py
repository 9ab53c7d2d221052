"""Memory that is freed stays in the process: to clear fresh pages costs as much as all other work of a conversion."""

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # glibc's malloc.h


def keep_freed_memory(nbytes: int) -> None:
    """From here on, allocations of any size come from one heap, which gives back what is free beyond `nbytes` alone.

    glibc gets every large tensor from the system, which clears its pages, and gives it back at once. Does nothing
    with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        for parameter, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, min(nbytes, 2**31 - 1))):
            mallopt(parameter, value)
