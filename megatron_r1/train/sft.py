"""`megatron-r1 sft`: supervised fine-tuning on prompts and responses.

::

    rows -> audited, encoded once -> batch of a step -> packed, no attention between sequences
                                                              |
       checkpoint <- policy.step(cross-entropy of the response tokens, mean over the global batch)
            |
       HF export at the end
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1.checkpoint.source import weights
from megatron_r1.checkpoint.store import Checkpoints
from megatron_r1.config.load import dump
from megatron_r1.config.sft import ChatsSection, SFTConfig
from megatron_r1.data.encoded_chats import EncodedChats, encode
from megatron_r1.data.epochs import Epochs
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError
from megatron_r1.loss.cross_entropy import CrossEntropy
from megatron_r1.model import hf_folder, lora
from megatron_r1.model.build import build_model, check_tokenizer
from megatron_r1.model.parallel import consumed_by_first_rank, from_first_rank, initialize, is_first_rank
from megatron_r1.model.placement import parameter_counts
from megatron_r1.report.run import Report
from megatron_r1.seeds import stream_seed
from megatron_r1.train import memory
from megatron_r1.train.batch import Minibatch, Trajectory, split
from megatron_r1.train.guard import Guard
from megatron_r1.train.heartbeat import Heartbeat
from megatron_r1.train.policy import Figures, Policy
from megatron_r1.train.throughput import Throughput
from megatron_r1.wording import counted


def run(config: SFTConfig) -> dict[str, Any]:
    """Train, or go on where the output folder's newest checkpoint stands; ends with an HF export."""
    initialize(config.parallel, config.seed, config.model.kernels)
    ranks = dist.get_rank(), dist.get_world_size()
    with Heartbeat(config.output, config.guard, *ranks, "megatron-r1 sft") as heartbeat:
        return _train(config, heartbeat)


def _train(config: SFTConfig, heartbeat: Heartbeat) -> dict[str, Any]:
    tokenizer = Tokenizer.load(config.tokenizer or config.model.path)
    rows = _Rows.read(config, tokenizer)
    model = build_model(config.model, config.max_length, "vocabulary", weights(config.model.path))
    check_tokenizer(model, tokenizer.vocab_size, tokenizer.eos_id)
    steps, counts = rows.epochs.steps, parameter_counts(model.chunks)
    learner = _Learner(config, rows, Policy(model, config.optim, steps))
    identity = {"seed": config.seed, "batch": config.batch, "data": rows.digest(config)}
    checkpoints = Checkpoints(config.output / "checkpoints", config.checkpoint, identity, learner.describe)
    start = checkpoints.latest() or 0
    trainable = learner.policy.trainable
    carried = checkpoints.load(start, trainable, {}) if start else {}
    title, first = config.report.title or "Supervised fine-tuning", is_first_rank()
    report = Report(config.output, config.report, title, steps, dump(config), start, first, heartbeat.beat)
    guard = Guard(config.guard, config.output, dist.get_rank(), report.message)
    carried = guard.restore(carried)
    with report, checkpoints.running(report.message):
        report.message(f"{lora.size(counts, model.config.params_dtype)}; {rows.describe(config)}")
        report.message(model.kernels.said)
        for warning in rows.warnings():
            report.message(warning)
        for step in range(start, steps):
            if not step or (config.validation.every and step % config.validation.every == 0):
                carried |= {f"{name}_base": value for name, value in learner.validate(step, report).items() if not step}
            with report.step(step):
                figures = learner.step(step, report, guard)
            carried["loss"] = figures["loss"]
            if checkpoints.due(step + 1, steps):
                with report.phase("checkpoint"):
                    checkpoints.save(step + 1, trainable, {}, carried | guard.state())
        carried |= learner.validate(steps, report)
        with report.phase("export"):
            learner.save_model()
        return report.summary(_summary(config, rows, counts.total) | carried)


@dataclass
class _Rows:
    """What is trained on, what is measured, and in which order."""

    chats: EncodedChats
    validation: EncodedChats | None
    epochs: Epochs
    training: list[int]
    """Numbers in `chats`."""
    heldout: list[int]
    """Numbers in `chats`."""

    @classmethod
    def read(cls, config: SFTConfig, tokenizer: Tokenizer) -> "_Rows":
        """Encoded on the first rank; what is wrong with the data is raised on all."""

        def encoded(name: str, sources: list[ChatsSection]) -> EncodedChats:
            folder, strict = config.output / "cache" / name, config.bad_rows == "stop"
            from_first_rank(lambda: encode(sources, tokenizer, folder, config.max_length, strict))
            return EncodedChats(folder)

        chats, section = encoded("train", config.data), config.validation
        training, heldout = (chats.part(section.share, chosen, len(config.data)) for chosen in (False, True))
        for what, part in (("train on", training), ("validate on", heldout)):
            if section.share and not any(part):
                raise DataError(f"validation.share = {section.share} of {len(chats)} rows leaves none to {what}")
        return cls(
            chats=chats,
            validation=encoded("validation", section.data) if section.data else None,
            epochs=Epochs(
                training, [source.weight for source in config.data], config.epochs, config.batch, config.seed
            ),
            training=[number for part in training for number in part],
            heldout=[number for part in heldout for number in part],
        )

    def digest(self, config: SFTConfig) -> int:
        """A number that changes with the rows of any step."""
        return stream_seed(
            self.chats.digest, str(config.validation.share), *(str(source.weight) for source in config.data)
        )

    def batch(self, step: int) -> list[Trajectory]:
        """What a step trains on."""
        return [_trajectory(self.chats, number) for number in self.epochs.batch(step)]

    def measured(self) -> list[Trajectory]:
        """What the validation loss is of."""
        files = [_trajectory(self.validation, n) for n in range(len(self.validation))] if self.validation else []
        return files + [_trajectory(self.chats, number) for number in self.heldout]

    def warnings(self) -> list[str]:
        """What the audit has to say."""
        return [text for chats in (self.chats, self.validation) if chats for text in chats.audit.warnings()]

    def describe(self, config: SFTConfig) -> str:
        """The run's arithmetic, and its data by domain."""
        domains = ", ".join(f"{name} {part['rows']:,}" for name, part in self.chats.table(self.training).items())
        return (
            f"{counted(config.epochs, 'epoch')} x {counted(self.epochs.rows_per_epoch, 'row')} = "
            f"{counted(self.epochs.steps, 'step')} of {config.batch} ({domains})"
        )


class _Learner:
    """The policy and what it is fed."""

    def __init__(self, config: SFTConfig, rows: _Rows, policy: Policy) -> None:
        self._config, self._rows, self.policy = config, rows, policy
        self._loss = CrossEntropy()
        self._measured = rows.measured()
        self._throughput = Throughput(policy.model, dist.get_world_size())

    def step(self, step: int, report: Report, guard: Guard) -> Figures:
        """One optimizer update."""
        policy = self.policy
        with report.phase("data"):
            batch = self._rows.batch(step)
            minibatch = self._share(batch, step)
        tick = time.perf_counter()
        with report.phase("update"):
            figures = policy.step(minibatch, self._loss, guard.judge)
            guard.follow_up(step, minibatch, lambda part: [-said for said in policy.outputs(part)])
        speed = self._throughput.figures([row.length for row in batch], time.perf_counter() - tick)
        report.add(figures | speed | memory.peak() | {"rows": len(batch)})
        return figures

    def validate(self, step: int, report: Report) -> Figures:
        """Loss on the held-out rows of the model as it is after `step` steps; empty without such rows."""
        if not self._measured:
            return {}
        with report.phase("validation"):
            figures = {"validation_loss": self.policy.evaluate(self._share(self._measured, 0), self._loss)["loss"]}
        report.evaluation(step, figures)
        return figures

    def save_model(self) -> None:
        """Write the trained model as a Hugging Face folder, adapters merged."""
        config, model = self._config, self.policy.model
        consumed_by_first_rank(
            lambda tensors: hf_folder.write(config.output / "hf", model.hf, tensors, *self._sources),
            model.export(getattr(torch, config.model.dtype)),
        )

    def describe(self, folder: Path) -> None:
        """Write beside weights what model they are of."""
        hf_folder.describe(folder, self.policy.model.hf, *self._sources)

    @property
    def _sources(self) -> tuple[Path, Path]:
        """Where the tokenizer stands, and other files of the model."""
        return self._config.tokenizer or self._config.model.path, self._config.model.path

    def _share(self, rows: list[Trajectory], seed: int) -> Minibatch:
        share = self.policy.share(self._config.tokens_per_microbatch)
        return next(split(rows, 1, seed, self._loss, share))


def _trajectory(chats: EncodedChats, number: int) -> Trajectory:
    return Trajectory(tokens=chats.tokens(number), response_length=chats.response_length(number))


def _summary(config: SFTConfig, rows: _Rows, parameters: int) -> dict[str, Any]:
    return {
        "model": str(config.output / "hf"),
        "parameters": parameters,
        "steps": rows.epochs.steps,
        "rows": len(rows.training),
        "rows_validation": len(rows.heldout) + len(rows.validation or ()),
        "left_out": rows.chats.audit.problems,
        "seams": rows.chats.audit.seams,
        "domains": rows.chats.table(rows.training),
    }
