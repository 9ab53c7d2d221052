"""The vLLM servers of a run as one engine: started together, fed together, stopped together."""

import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from megatron_r1.config.asynchrony import WeightsChange
from megatron_r1.config.engine_arguments import ranks
from megatron_r1.config.schedule import value_at_step
from megatron_r1.config.sections import RolloutSection
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.rollout.client import wait_until_healthy
from megatron_r1.rollout.conversation import Conversation
from megatron_r1.rollout.engine import Decode, Sampling
from megatron_r1.rollout.engines import Engines, Work
from megatron_r1.rollout.flow import Flow
from megatron_r1.rollout.member import START_KEY, Member, Weights
from megatron_r1.rollout.passing import pass_weights, sleep, wake
from megatron_r1.rollout.refill import Refill
from megatron_r1.rollout.responses import to_sample
from megatron_r1.rollout.server import RemoteServer, Server, engine_server, read_config
from megatron_r1.rollout.shares import Shares
from megatron_r1.seeds import stream_seed
from megatron_r1.types import Question, Sample


class Fleet:
    """The vLLM servers of a run; a context manager that leaves no process behind.

    An engine that is lost is restarted and brought to the right weights (`engines.py`); how prompts reach engines is
    `section.dispatch` (`shares.py`, `refill.py`).

    Args:
        section: the run file's [rollout].
        model: the Hugging Face folder that the servers load; later weights are pushed into them.
        run_dir: the servers log to `<run_dir>/logs/engine-<i>.log`.
        dtype: what the engines compute in, "float32" or "bfloat16".
        decode: token ids -> text, for `Sample.text`.
        version: version of the weights in `model`.
        conversation: what answers the model within responses, where `stream` is given questions; ends with the fleet.

    Raises:
        EngineError: a port is in use, or a server died at start or was not ready in time.
        DataError: the model folder has no readable config.json, or names no end-of-sequence token.
        ConfigError: engines at addresses, and no token for them in the environment.
    """

    def __init__(
        self,
        section: RolloutSection,
        model: Path,
        run_dir: Path,
        dtype: str,
        decode: Decode,
        version: int = 0,
        conversation: Conversation | None = None,
    ) -> None:
        self.section = section
        self.version = version
        """Version of the weights that the next responses come from."""
        self.updated = 0.0
        """When engines were last told to take new weights, seconds of `time.monotonic()`."""
        self._model, self._run_dir, self._dtype, self._decode = model, run_dir, dtype, decode
        self._stop_token_ids = stop_token_ids(model)
        self._token = _token(section)
        self._engines: Engines | None = None
        self._conversation = conversation
        self._members: list[Member] = []
        weights = Weights(version)
        try:
            if conversation:
                conversation.prepare()
            for index in range(len(section.addresses) or section.engines):
                self._members.append(Member(f"engine-{index}", section, partial(self.server, index), self._token))
            wait_until_healthy([member.client for member in self._members], section.start_timeout, START_KEY)
            for member in self._members:
                member.load(weights)
            self._engines = Engines(self._members, section, weights)
            self._engines.conversation = conversation
            self.feed(section.dispatch)
        except BaseException:  # Ctrl-C and SIGTERM too
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def feed(self, dispatch: Literal["batch", "continuous"]) -> None:
        """Choose how prompts reach engines; not while they are busy."""
        engines = self._running
        self._dispatch: Refill | Shares
        if dispatch == "continuous":
            replicas = ranks(self.section.arguments)[2]
            self._dispatch = Refill(engines, self.section.max_num_seqs * replicas)
        else:
            self._dispatch, engines.watcher = Shares(engines), None

    def server(self, index: int) -> Server | RemoteServer:
        """Start engine number `index`, or say where it is."""
        if self.section.addresses:
            return RemoteServer(self.section.addresses[index])
        log = self._run_dir / "logs" / f"engine-{index}.log"
        return engine_server(self.section, index, self._model, self._dtype, log, self._token)

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
        """See `Engine.sample`; bitwise the same every time with `dispatch = "batch"` only."""
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
        questions: Sequence[Question] | None = None,
    ) -> Iterator[tuple[int, list[Sample]]]:
        """See `Engine.stream`."""
        sampling = Sampling(
            temperature=self.section.temperature if temperature is None else temperature,
            top_p=1.0 if top_p is None else top_p,
            stop_token_ids=self._stop_token_ids,
            routed_experts=self.section.returns_experts,
        )
        longest = max_tokens or self._longest(self.version)
        room = [self._room(index, prompt, longest) for index, prompt in enumerate(prompts)]
        # vLLM itself gives sample i of every prompt the seed `seed + i`, which shares the noise between prompts.
        seeds = [[stream_seed(seed, index, sample) for sample in range(n)] for index in range(len(prompts))]
        work = Work(list(prompts), seeds, room, sampling, list(questions) if questions else None)
        running = self._running.start(self._dispatch.run(work))
        running.add_done_callback(lambda _: work.arrived.put(None))
        try:
            for _ in prompts:
                if (arrived := work.arrived.get()) is None:
                    running.result()
                    raise RuntimeError("the dispatch has ended before all prompts were answered")
                index, responses = arrived
                yield index, [to_sample(response, self._decode) for response in responses]
        finally:
            running.cancel()

    def flow(self, weights_change: WeightsChange = "in_flight") -> Flow:
        """Groups that are asked one by one while the caller does something else; needs `dispatch = "continuous"`."""
        if not isinstance(self._dispatch, Refill):
            raise RuntimeError('a flow needs dispatch = "continuous"')
        section = self.section
        sampling = Sampling(section.temperature, 1.0, self._stop_token_ids, section.returns_experts)

        def room(prompt: list[int], version: int) -> int:
            return self._room(0, prompt, self._longest(version))

        return Flow(self._running, self._dispatch, sampling, self._decode, room, weights_change)

    def idle(self) -> float:
        """See `Engines.idle`."""
        return self._running.start(self._running.idle()).result()

    def update_weights(self, path: Path, version: int) -> None:
        """See `Engine.update_weights`; every server reads the same files, which are kept for later ones (`Weights`)."""
        running, self.updated = self._running, time.monotonic()
        running.start(wake(running)).result()
        running.start(running.update_weights(path, version)).result()
        self.version = version

    def pass_weights(self, send: Callable[[list[Member]], None], version: int) -> None:
        """See `passing.pass_weights`."""
        self._running.start(pass_weights(self._running, send, version)).result()
        self.version = version

    def sleep(self) -> None:
        """See `passing.sleep`."""
        self._running.start(sleep(self._running)).result()

    def figures(self) -> dict[str, float]:
        """See `Engines.figures`."""
        return self._running.start(self._running.figures()).result()

    @property
    def counters(self) -> dict[str, int]:
        """See `Conversation.counters`."""
        return dict(self._conversation.counters) if self._conversation else {}

    def close(self) -> None:
        """Stop every server of the run, and its tools; may be called more than once."""
        for member in self._members:
            member.terminate()  # all at once, so that they end in parallel
        if self._engines:
            self._engines.close()
        for member in self._members:
            member.close()
        if self._conversation:
            self._conversation.close()

    @property
    def _running(self) -> Engines:
        if self._engines is None:
            raise RuntimeError("the fleet has not started")
        return self._engines

    def _longest(self, version: int) -> int:
        """Of responses that weights of a version may begin, which are those of the step of that number."""
        return value_at_step(self.section.max_tokens, version)

    def _room(self, index: int, prompt: list[int], longest: int) -> int:
        room = self.section.max_model_len - len(prompt)
        if room < 1 or not prompt:
            raise DataError(
                f"prompt {index} of the batch has {len(prompt)} tokens; it needs at least 1, and fewer than "
                f"rollout.max_model_len = {self.section.max_model_len} to leave room for a response "
                "(`megatron-r1 data filter` with [length] drops longer ones from a data set)"
            )
        return min(room, longest)


def _token(section: RolloutSection) -> str:
    """What the run's own engines are told to ask for, or what those at addresses do."""
    if not section.addresses:
        return secrets.token_urlsafe(32)
    token = os.environ.get(section.token_env, "")
    if not token:
        raise ConfigError(f"rollout.addresses needs the engines' token in the environment as {section.token_env}")
    return token


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
