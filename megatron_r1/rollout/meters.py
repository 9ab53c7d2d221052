"""How busy engines are, over time: one by itself, and all together."""

import time


class Meter:
    """How much an engine has to do, and does."""

    def __init__(self) -> None:
        self.queue = 0
        """Samples that it was asked for and has not given."""
        self._tokens = self._responses = 0
        self._length = 0.0
        """Mean tokens of a response when there was one last."""
        self._busy = self._queued = 0.0
        self._since = time.monotonic()

    def asked(self, samples: int) -> None:
        """So many samples more are awaited; fewer, if negative."""
        now = time.monotonic()
        if self.queue:
            self._busy += now - self._since
            self._queued += self.queue * (now - self._since)
        self._since = now
        self.queue += samples

    def answered(self, tokens: int) -> None:
        """A sample of so many is there."""
        self._tokens += tokens
        self._responses += 1

    def figures(self) -> dict[str, float]:
        """While it had something to do, since the last call: tokens/s, and means of the samples that were awaited
        (`queue`) and of the tokens of so many samples (`outstanding_tokens`).
        """
        self.asked(0)
        busy = self._busy or 1.0
        if self._responses:
            self._length = self._tokens / self._responses
        queue = self._queued / busy
        found = {"tokens_per_s": self._tokens / busy, "queue": queue, "outstanding_tokens": queue * self._length}
        self._tokens = self._responses = 0
        self._busy = self._queued = 0.0
        return found


class Busy:
    """How many engines have something to do, over time."""

    def __init__(self) -> None:
        self._engines, self._area = 0, 0.0
        self._since = self._began = time.monotonic()

    def change(self, engines: int) -> None:
        """So many more have."""
        now = time.monotonic()
        self._area += self._engines * (now - self._since)
        self._since = now
        self._engines += engines

    def mean(self) -> float:
        """Since the last call."""
        self.change(0)
        mean = self._area / max(self._since - self._began, 1e-9)
        self._area, self._began = 0.0, self._since
        return mean
