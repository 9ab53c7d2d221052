"""Questions -> scored groups. The engine and the judge live on the first rank; every rank gets the groups."""

import gc
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from itertools import accumulate, count
from types import TracebackType
from typing import Self, TypeVar

import torch
import torch.distributed as dist

from megatron_r1.config.reward_model_server import located
from megatron_r1.config.runs import RLConfig
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import EngineError
from megatron_r1.model.mapping import Export
from megatron_r1.model.parallel import from_first_rank, is_first_rank
from megatron_r1.report.run import Report
from megatron_r1.report.spans import SPANS, SYNC
from megatron_r1.reward.judge import Judge
from megatron_r1.rollout.conversation import Conversation
from megatron_r1.rollout.engine import PREFLIGHT
from megatron_r1.rollout.fan_out import TransferError
from megatron_r1.rollout.fleet import Fleet
from megatron_r1.rollout.scorer import Scorers
from megatron_r1.rollout.scoring import scored_groups
from megatron_r1.rollout.server import WeightsNeededError
from megatron_r1.train.feed import Feed, Service
from megatron_r1.train.interruption import Interruptions
from megatron_r1.types import Group, Question, Sample
from megatron_r1.weight_sync.fp8_weights import Fp8Weights
from megatron_r1.weight_sync.named_tensors import NamedTensors
from megatron_r1.weight_sync.transport import as_it_is, join_sync, open_sync, preflight, send

T = TypeVar("T")
SYNC_FOLDER = "sync"
"""In the output: files by which weights reach the engines."""


class Collector:
    """Samples groups from the rollout fleet and has them judged; a context manager.

    Args:
        config: the run.
        tokenizer: of the policy.
        report: where phase times go.
        interruptions: what ends a wait.
    """

    def __init__(self, config: RLConfig, tokenizer: Tokenizer, report: Report, interruptions: Interruptions) -> None:
        self._config, self._tokenizer, self._report = config, tokenizer, report
        self._interruptions = interruptions
        self._stack = ExitStack()
        self._version = 0
        self._tried = False
        self._stored: Callable[[NamedTensors], NamedTensors] = as_it_is
        """What engines are sent."""

    def __enter__(self) -> Self:
        with self._report.phase("start"):
            from_first_rank(self._open)
            self._join()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def push(self, export: Export, version: int) -> None:
        """Give the engines the policy's weights.

        Raises:
            TransferError: they have not arrived, `transfer_retries` times again.
        """
        with self._report.phase("sync"):
            if self._config.rollout.shares_gpus:
                self._make_room()
            for attempt in count():
                try:
                    self._try(export)
                    send(partial(self._push, version=version), export, self._config.rollout.chosen_transport)
                    break
                except TransferError as error:
                    if attempt == self._config.rollout.transfer_retries:
                        raise
                    self._report.message(f"sent again: {str(error).splitlines()[0]}")
        self._export, self._version = export, version

    def collect(
        self, questions: Sequence[Question], n: int, seed: int, temperature: float | None = None
    ) -> list[Group]:
        """`n` scored samples of each question: {o_i} ~ pi_old(.|q) and r_i.

        Raises:
            InterruptionError: a signal has asked the run to end.
        """
        return self._with_weights(lambda: self._scored(questions, n, seed, temperature))

    def _with_weights(self, work: Callable[[], T]) -> T:
        """What it returns; engines that have come back empty are filled, and it is called again."""
        while True:
            try:
                return work()
            except WeightsNeededError as error:  # the policy is as it was when these were pushed
                self._report.message(f"weights {self._version} are sent again: {error}")
                self.push(self._export, self._version)

    def _scored(self, questions: Sequence[Question], n: int, seed: int, temperature: float | None) -> list[Group]:
        def answered() -> list[tuple[list[int], list[Sample]]]:
            with self._interruptions.at_once():
                groups = self._collect(questions, n, seed, temperature)
            return [(group.prompt_tokens, group.samples) for group in groups]

        with self._report.phase("rollout"):
            # Every rank has the questions, and those of code bring megabytes of tests.
            parts = from_first_rank(answered)
        return [Group(question, *part) for question, part in zip(questions, parts, strict=True)]

    def rest(self) -> None:
        """Engines are not asked until the next push: with `rollout.sleep` they give their GPUs' memory back."""
        if self._config.rollout.sleep:
            from_first_rank(self._fleet.sleep)

    def at_first_rank(self, produce: Callable[[], T]) -> T:
        """What it returns, on all ranks; counts as rollout. Called again where engines had to get weights first."""

        def produced() -> T:
            with self._report.phase("rollout"):
                return from_first_rank(produce)

        return self._with_weights(produced)

    def interruptible(self) -> AbstractContextManager[None]:
        """On the first rank: a wait that a signal ends at once, with `InterruptionError`."""
        return self._interruptions.at_once()

    def service(self, seeds: Callable[[str], list[int]]) -> Service:
        """On the first rank: who samples and judges while the learner trains. `seeds`: of the samples of a group."""
        flow = self._fleet.flow(self._config.rollout.weights_change)
        return Service(flow, lambda question: self._tokenizer.encode_prompt(question.prompt), seeds, self._score)

    def opened(self, feed: Feed) -> Feed:
        """On the first rank: it ends with the collector."""
        return self._stack.enter_context(feed)

    def fleet_figures(self) -> dict[str, float]:
        """On the first rank, since the last call: `fleet_idle`, the share of the time in which an engine had nothing to
        do, and `fleet_<what>/<engine>`; elsewhere nothing.
        """
        if not is_first_rank():
            return {}
        parts = [(name.rpartition("/"), value) for name, value in self._fleet.figures().items()]
        named = {f"fleet_{what}" + (f"/{engine}" if engine else ""): value for (engine, _, what), value in parts}
        return {"fleet_idle": self._fleet.idle(), **named}

    def _open(self) -> None:
        config = self._config
        with self._interruptions.at_once(), self._stack:
            if config.rollout.fp8_path:
                self._stored = Fp8Weights(config.rollout.fp8_path, config.model.path)
            self._stack.enter_context(Scorers(config.reward_models, config.output))
            self._judge = self._stack.enter_context(
                Judge(
                    located(config.rewards, config.reward_models),
                    tasks=[section.task for section in config.tasks.values()],
                    workers=config.reward_workers,
                    timeout=config.reward_timeout,
                )
            )
            self._fleet = self._stack.enter_context(open_fleet(config, self._tokenizer))
            self._judge.wait_until_ready()
            self._sync = open_sync(config.rollout, self._fleet, config.output / SYNC_FOLDER)
            self._stack.callback(self._sync.close)
            self._stack = self._stack.pop_all()

    @staticmethod
    def _make_room() -> None:
        """Give back what an update has left reserved: engines that wake have to get their share of the GPU again."""
        gc.collect()
        torch.cuda.empty_cache()
        dist.barrier()  # the first rank wakes all of them

    def _join(self) -> None:
        """What the other ranks need for a push."""
        self._stored = from_first_rank(lambda: self._stored)
        if not is_first_rank() and (sync := join_sync(self._config.rollout, self._config.output / SYNC_FOLDER)):
            self._sync = sync

    def _try(self, export: Export) -> None:
        """The first time a few tensors go ahead, and what a push will be is said."""
        if not self._tried:
            transport = self._config.rollout.chosen_transport
            plan = preflight(lambda tensors: self._sync.push(tensors, PREFLIGHT), export, transport, self._stored)
            self._report.message(str(plan))
            self._tried = True

    def _push(self, tensors: NamedTensors, version: int) -> None:
        """On the ranks that send."""
        tensors = self._stored(tensors)
        began, gathered = time.monotonic(), math.inf

        def noted() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal gathered
            yield from tensors
            gathered = time.monotonic()
            SPANS.add(SYNC, "gather", began, gathered)

        self._sync.push(tensors.turned_into(noted()), version)
        if is_first_rank() and gathered < self._fleet.updated:  # else tensors go out one by one as they are gathered
            SPANS.add(SYNC, "write", gathered, self._fleet.updated)

    def _collect(self, questions: Sequence[Question], n: int, seed: int, temperature: float | None) -> list[Group]:
        prompts = [self._tokenizer.encode_prompt(question.prompt) for question in questions]
        stream = self._fleet.stream(prompts, n=n, seed=seed, temperature=temperature, questions=questions)
        phase = partial(self._report.phase, alone=True)
        groups = scored_groups(stream, self._judge, questions, prompts, phase)
        stale = {sample.weight_version for group in groups for sample in group.samples} - {self._version}
        if stale:
            raise EngineError(f"samples come from weights {sorted(stale)}, but {self._version} was pushed last")
        self._place_marks(groups)
        return groups

    def _score(self, groups: Sequence[Group]) -> None:
        """In another thread than `_collect`, which may wait for the samples of an evaluation meanwhile."""
        self._judge(groups)
        self._place_marks(groups)

    def _place_marks(self, groups: Sequence[Group]) -> None:
        for sample in (sample for group in groups for sample in group.samples if sample.step_marks):
            steps = by_token(sample.step_marks, self._tokenizer.pieces(sample.tokens))
            sample.step_rewards = among_sampled(steps, sample.mask) if sample.mask else steps

    @property
    def counters(self) -> dict[str, int]:
        """Verifications and calls of tools that failed since this process began; all ranks ask at once."""
        return from_first_rank(lambda: dict(self._judge.counters) | self._fleet.counters)


def open_fleet(config: RLConfig, tokenizer: Tokenizer) -> Fleet:
    """Start the engines, and the tools of [conversation]."""
    conversation = Conversation(config.conversation, tokenizer) if config.conversation else None
    dtype, served = config.model.dtype, config.rollout.served(config.model.path)
    return Fleet(config.rollout, served, config.output, dtype, tokenizer.decode, conversation=conversation)


def by_token(marks: Sequence[tuple[int, float]], pieces: Sequence[str]) -> list[tuple[int, float]]:
    """Steps that end at a character of the text, by the token that this character is in.

    Args:
        marks: (characters up to the step's end, reward).
        pieces: what each token adds to the text. [response]
    """
    ends = list(accumulate(map(len, pieces)))
    return [(bisect_left(ends, end), reward) for end, reward in marks]


def among_sampled(steps: Sequence[tuple[int, float]], mask: Sequence[bool]) -> list[tuple[int, float]]:
    """The steps that end in a sampled token, by its number among the sampled ones. `mask`: [response]"""
    numbers = [number - 1 for number in accumulate(mask)]
    return [(numbers[token], reward) for token, reward in steps if mask[token]]
