"""Questions -> scored groups. The engine and the judge live on the first rank; every rank gets the groups."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from itertools import accumulate
from types import TracebackType
from typing import Self

import torch

from megatron_r1.config.runs import RLConfig
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import EngineError
from megatron_r1.model.parallel import from_first_rank, is_first_rank
from megatron_r1.report.run import Report
from megatron_r1.reward.judge import Judge
from megatron_r1.rollout.fleet import Fleet
from megatron_r1.rollout.scorer import Scorers
from megatron_r1.rollout.scoring import scored_groups
from megatron_r1.types import Group, Question, Sample
from megatron_r1.weight_sync.shared_memory import SharedMemorySync


class Collector:
    """Samples groups from the rollout fleet and has them judged; a context manager.

    Args:
        config: the run.
        tokenizer: of the policy.
        report: where phase times go.
    """

    def __init__(self, config: RLConfig, tokenizer: Tokenizer, report: Report) -> None:
        self._config, self._tokenizer, self._report = config, tokenizer, report
        self._stack = ExitStack()
        self._version = 0

    def __enter__(self) -> Self:
        from_first_rank(self._open)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def push(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Give the engines the policy's weights."""
        with self._report.phase("sync"):
            from_first_rank(lambda: self._sync.push(named_tensors, version))
        self._version = version

    def collect(
        self, questions: Sequence[Question], n: int, seed: int, temperature: float | None = None
    ) -> list[Group]:
        """`n` scored samples of each question: {o_i} ~ pi_old(.|q) and r_i."""

        def answered() -> list[tuple[list[int], list[Sample]]]:
            return [(group.prompt_tokens, group.samples) for group in self._collect(questions, n, seed, temperature)]

        # Every rank has the questions, and those of code bring megabytes of tests.
        return [Group(question, *parts) for question, parts in zip(questions, from_first_rank(answered), strict=True)]

    def _open(self) -> None:
        config = self._config
        with self._stack:
            with self._report.phase("start"):
                self._stack.enter_context(Scorers(config.reward_models, config.output))
                self._judge = self._stack.enter_context(
                    Judge(
                        config.rewards,
                        tasks=[section.task for section in config.tasks.values()],
                        workers=config.reward_workers,
                        timeout=config.reward_timeout,
                    )
                )
                self._fleet = self._stack.enter_context(
                    Fleet(config.rollout, config.model.path, config.output, config.model.dtype, self._tokenizer.decode)
                )
                self._judge.wait_until_ready()
            self._sync = SharedMemorySync(self._fleet, fallback=config.output / "sync")
            self._stack = self._stack.pop_all()

    def _collect(self, questions: Sequence[Question], n: int, seed: int, temperature: float | None) -> list[Group]:
        prompts = [self._tokenizer.encode_prompt(question.prompt) for question in questions]
        stream = self._fleet.stream(prompts, n=n, seed=seed, temperature=temperature)
        groups = scored_groups(stream, self._judge, questions, prompts, self._report.phase)
        stale = {sample.weight_version for group in groups for sample in group.samples} - {self._version}
        if stale:
            raise EngineError(f"samples come from weights {sorted(stale)}, but {self._version} was pushed last")
        for sample in (sample for group in groups for sample in group.samples if sample.step_marks):
            sample.step_rewards = by_token(sample.step_marks, self._tokenizer.pieces(sample.tokens))
        return groups

    @property
    def counters(self) -> dict[str, int]:
        """Verifications that timed out or crashed since this process began."""
        return dict(self._judge.counters) if is_first_rank() else {}


def by_token(marks: Sequence[tuple[int, float]], pieces: Sequence[str]) -> list[tuple[int, float]]:
    """Steps that end at a character of the text, by the token that this character is in.

    Args:
        marks: (characters up to the step's end, reward).
        pieces: what each token adds to the text. [response]
    """
    ends = list(accumulate(map(len, pieces)))
    return [(bisect_left(ends, end), reward) for end, reward in marks]
