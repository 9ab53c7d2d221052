"""Requests in flight while the caller does something else: one event loop in a thread of its own."""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")


def submit(request: Coroutine[Any, Any, T]) -> "Future[T]":
    """Begin to run a coroutine beside everything else of this process."""
    return asyncio.run_coroutine_threadsafe(request, _loop())


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    # A daemon: a process that ends does not wait for answers.
    threading.Thread(target=loop.run_forever, name="requests", daemon=True).start()
    return loop
