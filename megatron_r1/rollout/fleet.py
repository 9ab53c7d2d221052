"""The vLLM servers of a run as one engine: started together, fed together, stopped together."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar

from megatron_r1.config.sections import RolloutSection
from megatron_r1.errors import DataError
from megatron_r1.rollout.client import HEALTH_SECONDS, Client, wait_until_healthy
from megatron_r1.rollout.engine import Decode, Sampling, to_sample
from megatron_r1.rollout.server import Server, engine_server, read_config
from megatron_r1.seeds import stream_seed
from megatron_r1.types import Sample

T = TypeVar("T")
POLL_SECONDS = 0.25


class Fleet:
    """`section.engines` vLLM servers; a context manager that leaves no process behind.

    Args:
        section: the run file's [rollout].
        model: the Hugging Face folder that the servers load; later weights are pushed into them.
        run_dir: the servers log to `<run_dir>/logs/engine-<i>.log`.
        dtype: what the engines compute in, "float32" or "bfloat16".
        decode: token ids -> text, for `Sample.text`.
        version: version of the weights in `model`.

    Raises:
        EngineError: a port is in use, or a server died at start or was not ready in time.
        DataError: the model folder has no readable config.json, or names no end-of-sequence token.
    """

    def __init__(
        self, section: RolloutSection, model: Path, run_dir: Path, dtype: str, decode: Decode, version: int = 0
    ) -> None:
        self.section = section
        self.run_dir = run_dir
        self.version = version
        """Version of the weights that the next responses come from."""
        self._decode = decode
        self._stop_token_ids = stop_token_ids(model)
        self._servers: list[Server] = []
        self._clients: list[Client] = []
        self._threads = ThreadPoolExecutor(section.engines, thread_name_prefix="rollout")
        try:
            for index in range(section.engines):
                log = run_dir / "logs" / f"engine-{index}.log"
                self._servers.append(engine_server(section, index, model, dtype, log))
            self._clients = [Client(server, section.request_timeout) for server in self._servers]
            wait_until_healthy(self._clients, section.start_timeout, "rollout.start_timeout")
            self._on_all(lambda client: client.set_weight_version(version))
        except BaseException:  # Ctrl-C and SIGTERM too
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def sample(
        self,
        prompts: Sequence[list[int]],
        *,
        n: int,
        seed: int,
        temperature: float | None = None,
        top_p: float | None = None,
        max_tokens: int | None = None,
    ) -> list[list[Sample]]:
        """See `Engine.sample`."""
        answers = dict(
            self.stream(prompts, n=n, seed=seed, temperature=temperature, top_p=top_p, max_tokens=max_tokens)
        )
        return [answers[index] for index in range(len(prompts))]

    def stream(
        self,
        prompts: Sequence[list[int]],
        *,
        n: int,
        seed: int,
        temperature: float | None = None,
        top_p: float | None = None,
        max_tokens: int | None = None,
    ) -> Iterator[tuple[int, list[Sample]]]:
        """See `Engine.stream`. Prompts are dealt out in contiguous shares, one to each server."""
        sampling = Sampling(
            temperature=self.section.temperature if temperature is None else temperature,
            top_p=1.0 if top_p is None else top_p,
            max_tokens=max_tokens or self.section.max_tokens,
            stop_token_ids=self._stop_token_ids,
        )
        room = [self._room(index, prompt, sampling) for index, prompt in enumerate(prompts)]
        # vLLM itself gives sample i of every prompt the seed `seed + i`, which shares the noise between prompts.
        seeds = [[stream_seed(seed, index, sample) for sample in range(n)] for index in range(len(prompts))]
        share = -(-len(prompts) // len(self._clients))
        arrived: SimpleQueue[tuple[int, list[dict[str, Any]]]] = SimpleQueue()

        def draw(engine: int) -> None:
            part = slice(engine * share, (engine + 1) * share)
            if prompts[part]:
                for index, answers in self._clients[engine].sample(
                    list(prompts[part]), seeds[part], room[part], sampling
                ):
                    arrived.put((part.start + index, answers))

        futures = [self._threads.submit(draw, engine) for engine in range(len(self._clients))]
        for _ in prompts:
            index, answers = self._next(arrived, futures)
            yield index, [to_sample(answer, self._decode) for answer in answers]

    def update_weights(self, path: Path, version: int) -> None:
        """See `Engine.update_weights`; every server reads the same file."""
        self._on_all(lambda client: client.update_weights(path, version))
        self.version = version

    def check(self) -> None:
        """Raise `EngineError` if a server has died; between batches nothing else would notice."""
        for server in self._servers:
            if not server.alive():
                raise server.failure("has died")

    def close(self) -> None:
        """Stop every server; may be called more than once."""
        for server in self._servers:
            server.terminate()  # all at once, so that they end in parallel
        for server in self._servers:
            server.close()
        for client in self._clients:
            client.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _room(self, index: int, prompt: list[int], sampling: Sampling) -> int:
        room = self.section.max_model_len - len(prompt)
        if room < 1 or not prompt:
            raise DataError(
                f"prompt {index} of the batch has {len(prompt)} tokens; it needs at least 1, and fewer than "
                f"rollout.max_model_len = {self.section.max_model_len} to leave room for a response "
                "(`megatron-r1 data filter` with [length] drops longer ones from a data set)"
            )
        return min(room, sampling.max_tokens)

    def _next(self, arrived: "SimpleQueue[T]", futures: Sequence["Future[None]"]) -> T:
        """What arrives next; a failure of any server is raised without waiting for the others.

        A server whose engine has died may hold its connections open for ever, so health is asked for meanwhile.
        """
        asked = time.monotonic()
        while True:
            for future in futures:
                if future.done():
                    future.result()
            with suppress(Empty):
                return arrived.get(timeout=POLL_SECONDS)
            if time.monotonic() - asked > HEALTH_SECONDS:
                asked = time.monotonic()
                self._check_answering()

    def _on_all(self, call: Callable[[Client], None]) -> None:
        """`call` for each server at once; the first failure is raised without waiting for the others."""
        futures = [self._threads.submit(call, client) for client in self._clients]
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, HEALTH_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
            if not done:
                self._check_answering()

    def _check_answering(self) -> None:
        for client in self._clients:
            if client.lost():
                raise client.server.failure("has died")


def stop_token_ids(model: Path) -> tuple[int, ...]:
    """The end-of-sequence ids that generation_config.json names, else config.json."""
    file = model / "generation_config.json"
    try:
        named = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON: {error}") from error
    ids = named if named is not None else read_config(model).get("eos_token_id")
    if isinstance(ids, int):
        return (ids,)
    if not isinstance(ids, list) or not ids:
        raise DataError(f"{model}/config.json names no eos_token_id, so no response would ever end by itself")
    return tuple(ids)
