"""An engine that only counts tokens, in simulated time; speeds by batch size and lengths of responses for it."""

import csv
import json
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from pathlib import Path

from megatron_r1.rollout.scheduler import Assignment, Key


class SimulatedEngine:
    """Continuous batching: all sequences that run get one token in the same time."""

    def __init__(self, slots: int, seconds: Sequence[float]) -> None:
        self.slots, self.seconds = slots, seconds
        """Seconds of a token, by sequences that run."""
        self.running: list[tuple[float, Key, int, int]] = []
        """(value of `done` at its end, group, sample, tokens)."""
        self.queue: deque[tuple[int, Key, int]] = deque()
        self.done = 0.0
        """Tokens that a sequence would have by now if it had been there from the start."""
        self.now = self.busy = self.occupied = 0.0
        """Time; seconds with any sequence; sequence seconds."""
        self.stands = False
        self.stamp = 0

    def advance(self, now: float) -> None:
        """Run up to a time."""
        passed, self.now = now - self.now, now
        if self.running:
            if not self.stands:
                self.done += passed / self.seconds[len(self.running)]
            self.busy += passed
            self.occupied += passed * len(self.running)

    def add(self, assignment: Assignment, lengths: Sequence[int]) -> None:
        """Take samples; those beyond the slots queue."""
        self.queue.extend((lengths[sample], assignment.key, sample) for sample in assignment.samples)
        self._fill()

    def drop(self, key: Key) -> None:
        """Forget a group."""
        self.queue = deque(entry for entry in self.queue if entry[1] != key)
        self.running = [entry for entry in self.running if entry[1] != key]
        heapify(self.running)
        self._fill()

    def pop(self) -> tuple[Key, int, int]:
        """The sequence that ends now: group, sample, tokens."""
        _, key, sample, length = heappop(self.running)
        self._fill()
        return key, sample, length

    def next_end(self) -> float | None:
        """When the next sequence ends, as things stand."""
        if not self.running or self.stands:
            return None
        return self.now + max(0.0, self.running[0][0] - self.done) * self.seconds[len(self.running)]

    def _fill(self) -> None:
        while self.queue and len(self.running) < self.slots:
            length, key, sample = self.queue.popleft()
            heappush(self.running, (self.done + length, key, sample, length))


def token_seconds(curve: Sequence[tuple[float, float]], slots: int) -> list[float]:
    """Seconds of one token of each sequence, by sequences that run; tokens/s are linear between points of the curve."""
    seconds = [0.0]
    for batch in range(1, slots + 1):
        below = max((point for point in curve if point[0] <= batch), default=curve[0])
        above = min((point for point in curve if point[0] >= batch), default=curve[-1])
        share = (batch - below[0]) / (above[0] - below[0]) if above[0] > below[0] else 0.0
        seconds.append(batch / (below[1] + share * (above[1] - below[1])))
    return seconds


def response_lengths(source: str, max_tokens: int) -> Callable[[random.Random, int], list[int]]:
    """A function that draws the lengths of a group: `constant:N`, `lognormal:MEDIAN:SIGMA:CORRELATION`, or a file.

    The correlation is that of the logarithms within a group: some questions are long for all samples. A file has one
    length a line (CSV: the first column or `length`; JSONL: a number or an object with `length`), drawn independently.
    """
    kind, *numbers = source.split(":")
    if kind == "constant":
        return lambda chance, count: [min(int(numbers[0]), max_tokens)] * count
    if kind == "lognormal":
        median, sigma, correlation = map(float, numbers)

        def draw(chance: random.Random, count: int) -> list[int]:
            shared = correlation**0.5 * chance.gauss()
            own = [(1 - correlation) ** 0.5 * chance.gauss() for _ in range(count)]
            scaled = [median * math.exp(sigma * (shared + one)) for one in own]
            return [max(1, min(round(one), max_tokens)) for one in scaled]

        return draw
    known = [min(length, max_tokens) for length in read_lengths(Path(source))]
    return lambda chance, count: chance.choices(known, k=count)


def read_lengths(path: Path) -> list[int]:
    with path.open(encoding="utf-8", newline="") as lines:
        if path.suffix == ".jsonl":
            values = [json.loads(line) for line in lines if line.strip()]
            return [int(value["length"] if isinstance(value, dict) else value) for value in values]
        rows = [row for row in csv.reader(lines) if row]
    column = rows[0].index("length") if "length" in rows[0] else 0
    return [int(float(row[column])) for row in rows if row[column].replace(".", "", 1).isdigit()]
