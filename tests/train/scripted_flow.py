"""Stands where a fleet's flow does, without engines: what was asked is there to be seen, and answered on demand."""

import random
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from megatron_r1.errors import EngineError
from megatron_r1.rollout.flow import Complete, Event, Newer, Sent
from megatron_r1.rollout.responses import Response
from megatron_r1.types import Question, Sample

Answer = Callable[[str, int], list[Sample]]
"""Samples of a group, by its name and the version of the weights."""


class Script:
    """Answers what the test says, when it says so."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.version = 0
        self.beginnings: dict[str, list[Response]] = {}
        """Of groups that are asked, as far as they are."""
        self.asked: dict[str, int] = {}
        """Groups that are not answered, and the version that each needs."""
        self.history: list[str] = []
        """All that was ever asked."""
        self.cancelled: list[str] = []
        self.lost: EngineError | None = None
        """Why no engine answers."""
        self._events: SimpleQueue[list[Event]] = SimpleQueue()

    def submit(
        self,
        key: str,
        prompt: list[int],
        seeds: list[int],
        at_least: int,
        question: Question | None = None,
        had: Sequence[Response] = (),
    ) -> None:
        assert key not in self.asked, "asked twice"
        assert prompt
        assert seeds
        self.asked[key] = at_least
        self.history.append(key)
        if had:
            self.beginnings[key] = list(had)

    def cancel(self, keys: Sequence[str]) -> None:
        self.cancelled += keys
        for key in keys:
            self.asked.pop(key, None)

    def had(self) -> dict[str, list[Response]]:
        return {key: had for key, had in self.beginnings.items() if key in self.asked}

    def hopeless(self) -> EngineError | None:
        return self.lost

    def events(self) -> list[Event]:
        return self._events.get()

    def close(self) -> None:
        self._events.put([])

    def say(self, *events: Event) -> None:
        self._events.put(list(events))

    def push(self, version: int) -> None:
        """New weights."""
        self.version, self.lost = version, None
        self.say(Newer(version))

    def complete(self, *keys: str) -> None:
        """These groups are sampled from beginning to end."""
        for key in keys:
            assert self.asked.pop(key) <= self.version
            self.say(Sent(key, self.version), Complete(key, self.answer(key, self.version)))


class Working(Script):
    """Answers by itself, in a random order, from a thread that ends with the flow."""

    def __init__(self, answer: Answer, seed: int = 0, seconds: float = 0.003) -> None:
        super().__init__(answer)
        self._chance, self._seconds = random.Random(seed), seconds
        self._closed = threading.Event()
        threading.Thread(target=self._work, daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        super().close()

    def _work(self) -> None:
        while not self._closed.is_set():
            time.sleep(self._chance.uniform(0, 2 * self._seconds))
            able = [key for key, at_least in list(self.asked.items()) if at_least <= self.version]
            if able:
                self.complete(self._chance.choice(able))
