"""Questions -> judged answers, a batch at a time; a batch that was answered before is read back.

The engines start when the first batch has to be sampled, so a run that only counts again needs none.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import Progress

from megatron_r1.config.evaluation import SamplingSection, ServedModelSection
from megatron_r1.config.reward_model_server import RewardModelServerSection, located
from megatron_r1.config.section import Component
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.registry import resolve
from megatron_r1.reward.judge import Judge
from megatron_r1.rollout.answers import Answer, AnswerFile, digest, to_answers
from megatron_r1.rollout.conversation import Conversation
from megatron_r1.rollout.engine import Engine
from megatron_r1.rollout.fleet import Fleet
from megatron_r1.rollout.scorer import Scorers
from megatron_r1.rollout.scoring import scored_groups
from megatron_r1.seeds import stream_seed
from megatron_r1.types import Question, Sample

SCORED = "scored.jsonl"

OpenEngine = Callable[[SamplingSection, Path, Tokenizer], AbstractContextManager[Engine]]
"""Config, output folder and tokenizer -> a running engine."""


def open_fleet(config: SamplingSection, output: Path, tokenizer: Tokenizer) -> Fleet:
    """The vLLM servers of [rollout]."""
    Console(stderr=True).print(f"starting the engines, which log to {output / 'logs'}", style="dim")
    conversation = Conversation(config.conversation, tokenizer) if config.conversation else None
    return Fleet(
        config.rollout, config.model.path, output, config.model.dtype, tokenizer.decode, conversation=conversation
    )


class Sampler:
    """Has a model answer questions and judges the answers; a context manager.

    Args:
        config: model, engines, samples.
        output: folder of `scored.jsonl` and of the engines' logs.
        open_engine: starts the engines when they are needed.

    Raises:
        DataError: no tokenizer or model where they should be, or a `scored.jsonl` that is not ours.
    """

    def __init__(self, config: SamplingSection, output: Path, open_engine: OpenEngine = open_fleet) -> None:
        self.tokenizer = Tokenizer.load(config.tokenizer or config.model.path)
        self._config = config
        self._output = output
        self._open_engine = open_engine
        self._engine: Engine | None = None
        self._stack = ExitStack()
        sampled_by = config.rollout.model_dump(mode="json", include=_SAMPLED_BY)
        judged_by = {name: _identity(section) for name, section in config.reward_models.items()}
        self._settings = [_identity(config.model), str(config.tokenizer), sampled_by, judged_by]
        if config.conversation:
            self._settings.append(config.conversation.model_dump(mode="json"))
        self._file = self._stack.enter_context(AnswerFile(output / SCORED))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def answers(
        self,
        questions: Iterable[Question],
        total: int,
        rewards: dict[str, Component],
        task: Component | None,
        samples: int,
    ) -> Iterator[tuple[Question, list[Answer]]]:
        """Each question, in order, with its answers.

        Args:
            questions: what is asked.
            total: how many these are, for the progress bar.
            rewards: what judges the answers.
            task: section of the task that the questions come from, for its verifier; None = they come from none.
            samples: answers to each question.

        Raises:
            EngineError: the engines do not start or die.
        """
        waiting = iter(questions)
        batches = iter(lambda: list(islice(waiting, self._config.batch)), [])
        with ExitStack() as stack:
            judge: Judge | None = None
            display = stack.enter_context(_Display(total))
            for number, batch in enumerate(batches):
                asked = [asdict(question) for question in batch]
                for question in asked:
                    if question["tools"] is None:  # as before there were any, whose journals are still good
                        del question["tools"]
                key = digest(self._settings, rewards, samples, self._config.seed, number, asked)
                if key not in self._file:
                    if judge is None:
                        stack.enter_context(Scorers(self._config.reward_models, self._output))
                        judge = stack.enter_context(self._judge(rewards, task))
                        judge.wait_until_ready()
                    self._file.append(key, self._sample(judge, batch, samples, number))
                display.answered(len(batch))
                yield from zip(batch, self._file.read(key), strict=True)

    def prompt(self, question: Question) -> str:
        """What the engine continues; a subclass may ask for something else than what is judged."""
        return question.prompt

    def edited(self, question: Question, sample: Sample) -> Sample:
        """What is judged, and kept, of what the engine said to `prompt(question)`."""
        return sample

    def _judge(self, rewards: dict[str, Component], task: Component | None) -> Judge:
        return Judge(
            located(rewards, self._config.reward_models),
            [task] if task else [],
            workers=self._config.reward_workers,
            timeout=self._config.reward_timeout,
        )

    def _sample(self, judge: Judge, batch: Sequence[Question], samples: int, number: int) -> list[list[Answer]]:
        if self._engine is None:
            opened = self._open_engine(self._config, self._output, self.tokenizer)
            self._engine = self._stack.enter_context(opened)
        prompts = [self.tokenizer.encode_prompt(self.prompt(question)) for question in batch]
        seed, rollout = stream_seed("answers", self._config.seed, number), self._config.rollout
        stream = self._engine.stream(
            prompts,
            n=samples,
            seed=seed,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            max_tokens=rollout.max_tokens,
            **({"questions": batch} if self._config.conversation else {}),
        )
        edited = ((index, [self.edited(batch[index], sample) for sample in found]) for index, found in stream)
        return [to_answers(group) for group in scored_groups(edited, judge, batch, prompts)]


def sample_seed(config: SamplingSection, position: int, sample: int) -> int:
    """The seed that an engine drew response number `sample` to the question at `position` with."""
    batch, index = divmod(position, config.batch)
    return stream_seed(stream_seed("answers", config.seed, batch), index, sample)


class _Display(Progress):
    """A bar on a terminal, a line for each batch anywhere else."""

    def __init__(self, total: int) -> None:
        console = Console(stderr=True)
        super().__init__(console=console, disable=not console.is_terminal)
        self._bar = self.add_task("questions", total=total)

    def answered(self, questions: int) -> None:
        self.update(self._bar, advance=questions)
        if not self.console.is_terminal:
            self.console.print(f"{self.tasks[0].completed:,.0f} of {self.tasks[0].total:,.0f} questions answered")


_SAMPLED_BY = {"temperature", "top_p", "max_tokens", "max_model_len", "arguments"}
"""Keys of [rollout] that answers depend on."""


def check_judged(rewards: dict[str, Component]) -> None:
    """Raise ConfigError unless one of the rewards judges whether an answer is right."""
    if not any(resolve("reward", section["type"]).judges_correctness for section in rewards.values()):
        named = ", ".join(f"{name} (type {section['type']!r})" for name, section in rewards.items())
        raise ConfigError(
            f"no reward judges whether an answer is right (there is {named or 'none at all'}), so there is nothing to "
            "count; name one in [rewards], such as type = 'accuracy' for problems with a reference answer"
        )


def _identity(model: ServedModelSection | RewardModelServerSection) -> list[Any]:
    """What tells one model from another without reading its weights: the files, their sizes and times."""
    if not model.path.is_dir():
        raise DataError(f"there is no model folder {model.path}")
    files = sorted(file for file in model.path.iterdir() if file.is_file())
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return [str(model.path.resolve()), model.dtype, stamps]
