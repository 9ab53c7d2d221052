"""A byte budget that worker threads share, so that memory does not grow with their number."""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class ByteBudget:
    """At most `limit` bytes in use at a time; who needs more than all of it works alone.

    Served in the order of asking: a large request is not starved by small ones.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._free = limit
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()

    @contextmanager
    def hold(self, nbytes: int) -> Iterator[None]:
        """Wait for `nbytes`, and give them back at the end of the block. A block must not hold twice."""
        share, ticket = min(nbytes, self.limit), object()
        with self._changed:
            self._queue.append(ticket)
            self._changed.wait_for(lambda: self._queue[0] is ticket and self._free >= share)
            self._queue.popleft()
            self._free -= share
            self._changed.notify_all()  # the next in line may fit too
        try:
            yield
        finally:
            with self._changed:
                self._free += share
                self._changed.notify_all()
