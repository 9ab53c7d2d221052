"""`megatron-r1 pretrain`: next-token prediction over indexed datasets.

::

    corpus rows -> microbatches -> policy.step(cross-entropy + MTP + balance loss) -> checkpoint
                                                    |                                    |
                                                 report                    HF export at the end
"""

import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1.checkpoint.source import weights
from megatron_r1.checkpoint.store import Checkpoints
from megatron_r1.config.corpus import WeightedDataset
from megatron_r1.config.load import dump
from megatron_r1.config.runs import PretrainConfig
from megatron_r1.data.pretraining import Corpus
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.loss.cross_entropy import CrossEntropy
from megatron_r1.model import hf_folder
from megatron_r1.model.build import build_model, check_tokenizer
from megatron_r1.model.parallel import consumed_by_first_rank, device, from_first_rank, initialize, is_first_rank
from megatron_r1.model.placement import parameter_counts
from megatron_r1.optim import schedule
from megatron_r1.report.run import Report
from megatron_r1.train import memory
from megatron_r1.train.batch import Minibatch, from_rows
from megatron_r1.train.batch_ramp import Ramp
from megatron_r1.train.guard import Guard, RewindError
from megatron_r1.train.heartbeat import Heartbeat
from megatron_r1.train.policy import Figures, Policy
from megatron_r1.train.rewinds import Rewinds
from megatron_r1.train.throughput import Throughput

LAST_ROW = "last_row"
"""Figure of a checkpoint: checksum of the last row that was read before it."""


def run(config: PretrainConfig) -> dict[str, Any]:
    """Pretrain, or go on where the output folder's newest checkpoint stands; ends with an HF export."""
    initialize(config.parallel, config.seed, config.model.kernels)
    ranks = dist.get_rank(), dist.get_world_size()
    with Heartbeat(config.output, config.guard, *ranks, "megatron-r1 pretrain") as heartbeat:
        return _Pretraining(config, heartbeat).run()


class _Pretraining:
    """One run: the model, what it is fed, and where it goes on."""

    def __init__(self, config: PretrainConfig, heartbeat: Heartbeat) -> None:
        self._config, self._heartbeat = config, heartbeat
        tokenizer, length = Tokenizer.load(config.tokenizer), config.corpus.sequence_length
        self._model = build_model(config.model, length, weights=weights(config.model.path))
        check_tokenizer(self._model, tokenizer.vocab_size, tokenizer.eos_id)
        self._parameters = parameter_counts(self._model.chunks).total
        self._ramp = Ramp(config.batch_ramp, config.batch, length)
        self._steps = config.steps or self._ramp.steps(config.tokens or 0)
        self._policy = Policy(self._model, config.optim, self._steps, tokens_before=self._ramp.tokens_before)
        self._throughput = Throughput(self._model, dist.get_world_size())
        identity = {"seed": config.seed, **self._ramp.identity}
        self._checkpoints = Checkpoints(
            config.output / "checkpoints",
            config.checkpoint,
            identity,
            lambda folder: hf_folder.describe(folder, self._model.hf, config.tokenizer, config.model.path),
        )
        self._start = self._checkpoints.latest() or 0
        self._rewinds = Rewinds(config.output, self._ramp.rows_before(self._steps), anew=not self._start)
        self._feed = _Feed(config, tokenizer, self._policy, self._ramp, self._rewinds, self._steps)

    def run(self) -> dict[str, Any]:
        """All steps; from an earlier checkpoint again where the guard says so."""
        while True:
            try:
                return self._run()
            except RewindError as bad:
                self._rewind(bad.step)

    def _run(self) -> dict[str, Any]:
        config, start, checkpoints = self._config, self._start, self._checkpoints
        carried = checkpoints.load(start, self._policy.trainable, {}) if start else {}
        title, first = config.report.title or "Pretraining", is_first_rank()
        report = Report(
            config.output, config.report, title, self._steps, dump(config), start, first, self._heartbeat.beat
        )
        guard = Guard(config.guard, config.output, dist.get_rank(), report.message)
        self._compare(start, guard.restore(carried))
        with report, checkpoints.running(report.message):
            tokens = config.batch * config.corpus.sequence_length
            report.message(f"{self._parameters:,} parameters, {tokens:,} tokens a step")
            report.message(self._policy.model.kernels.said)
            final = self._train(start, guard, report)
            with report.phase("export"):
                self._export()
            return report.summary(
                {
                    "model": str(config.output / "hf"),
                    "parameters": self._parameters,
                    "tokens": self._ramp.tokens_before(self._steps),
                    **final,
                }
            )

    def _train(self, start: int, guard: Guard, report: Report) -> Figures:
        """The steps from `start` on; returns the losses on held-out rows after the last."""
        config, policy, loss = self._config, self._policy, CrossEntropy()
        for step in range(start, self._steps):
            schedule.apply(self._model.config, config.model, self._ramp.tokens_before(step))
            if step and step % config.validation_every == 0:
                self._feed.heldout("validation", step, report, loss)
            with report.step(step):
                with report.phase("data"):
                    minibatch = self._feed.training(step)
                tick = time.perf_counter()
                with report.phase("update"):
                    report.add(policy.step(minibatch, loss, guard.judge))
                    guard.follow_up(step, minibatch, lambda batch: [-said for said in policy.outputs(batch)])
                rows = [config.corpus.sequence_length] * self._ramp.batch(step)
                report.add(self._throughput.figures(rows, time.perf_counter() - tick) | memory.peak())
            if self._checkpoints.due(step + 1, self._steps):
                with report.phase("checkpoint"):
                    mark = {LAST_ROW: self._feed.last_row(step + 1)}
                    self._checkpoints.save(step + 1, policy.trainable, {}, guard.state() | mark)
        final = [self._feed.heldout(name, self._steps, report, loss) for name in ("validation", "test")]
        return final[0] | final[1]

    def _compare(self, start: int, carried: Figures) -> None:
        """Warn where the steps before `start` would read other rows today."""
        if LAST_ROW in carried and carried[LAST_ROW] != self._feed.last_row(start):
            self._checkpoints.warnings.append(
                f"the {start} steps before were trained on other rows than this run file gives them: the datasets, "
                "their weights, fim_rate or, as all epochs are shuffled together, the number of steps has changed. "
                "Some rows may come twice and others never"
            )

    def _rewind(self, step: int) -> None:
        """Go back to a whole checkpoint before a bad update, and jump over what was read since."""
        self._start = self._whole(step)
        self._checkpoints.forget_after(self._start)
        positions = (self._ramp.rows_before(self._start), self._ramp.rows_before(step + 1))
        self._rewinds.add(step, self._start, *positions)
        from_first_rank(self._rewinds.save)

    def _whole(self, step: int) -> int:
        """The checkpoint to go back to from a bad update; damaged ones are passed over while the others still stand.

        Raises:
            NumericsError: as `Rewinds.target`.
            DataError: all that it could be are damaged.
        """
        kept = [done for done in self._checkpoints.kept() if done <= step]
        damaged: list[str] = []
        target = self._rewinds.target(step, kept, self._config.guard)
        while found := self._checkpoints.damage(target):
            damaged.append(found)
            kept.remove(target)
            if not kept:
                raise DataError(
                    f"a bad update at step {step}, and no checkpoint before it is whole: {'; '.join(damaged)}. Restore "
                    'the files, or delete the folders; the policy "skip" of [guard] needs none'
                )
            target = self._rewinds.target(step, kept, self._config.guard)
        if damaged:
            self._checkpoints.warnings.append(f"going back to step {target}: {'; '.join(damaged)}")
        return target

    def _export(self) -> None:
        config, model, folder = self._config, self._model, self._config.output / "hf"
        consumed_by_first_rank(
            lambda tensors: hf_folder.write(folder, model.hf, tensors, config.tokenizer, config.model.path),
            model.export(getattr(torch, config.model.dtype)),
        )


def _check_cuts(config: PretrainConfig, policy: Policy, ramp: Ramp) -> None:
    """That rows divide over the ranks of a batch, and tokens over those of a row.

    Raises:
        ConfigError: they do not.
    """
    multiple, length, unit = policy.passes.multiple, config.corpus.sequence_length, policy.passes.alignment.row
    for batch in ramp.sizes:
        if batch % (config.microbatch * policy.ranks * multiple) == 0:
            continue
        stages = f" x {multiple} pipeline stages" if multiple > 1 else ""
        raise ConfigError(
            f"batch {batch} does not divide into microbatch {config.microbatch} x {policy.ranks} data-parallel "
            f"ranks{stages}"
        )
    if length % unit:
        raise ConfigError(
            f"sequence_length {length} does not divide by {unit}, as tensor and context parallelism and FP8 need"
        )


class _Feed:
    """This rank's microbatches of each step."""

    def __init__(
        self, config: PretrainConfig, tokenizer: Tokenizer, policy: Policy, ramp: Ramp, rewinds: Rewinds, steps: int
    ) -> None:
        _check_cuts(config, policy, ramp)
        self._config, self._tokenizer, self._policy = config, tokenizer, policy
        self._ramp, self._rewinds = ramp, rewinds
        self._training = self._corpus("train", config.corpus.train, ramp.rows_before(steps))
        self._heldout_rows = config.validation_batches * config.batch
        paths = {"validation": config.corpus.validation, "test": config.corpus.test}
        self._heldout = {name: self._corpus(name, own, self._heldout_rows) for name, own in paths.items() if own}

    def training(self, step: int) -> Minibatch:
        """Microbatches of one optimizer step."""
        return self._share(self._training, self._ramp.rows_before(step), self._ramp.batch(step), self._rewinds.row)

    def last_row(self, step: int) -> float:
        """Checksum of the last row that is read before a step, of other data or in another order another."""
        number = self._rewinds.row(self._ramp.rows_before(step) - 1)
        return float(zlib.crc32(self._training.rows(number, 1, torch.device("cpu")).tokens.numpy().tobytes()))

    def heldout(self, name: str, step: int, report: Report, loss: CrossEntropy) -> Figures:
        """Loss on the validation or test rows of the policy as it is after `step` steps; empty without such rows."""
        if name not in self._heldout:
            return {}
        rows = self._share(self._heldout[name], 0, self._heldout_rows)
        with report.phase("validation"):
            figures = {f"{name}_loss": self._policy.evaluate(rows, loss)["loss"]}
        report.evaluation(step, figures)
        return figures

    def _corpus(self, name: str, paths: Sequence[Path | WeightedDataset], rows: int) -> Corpus:
        config = self._config
        cache = config.output / "cache" / name
        fim_rate = config.corpus.fim_rate if name == "train" else 0.0
        return Corpus(paths, self._tokenizer, config.corpus.sequence_length, rows, cache, config.seed, fim_rate)

    def _share(self, corpus: Corpus, start: int, count: int, row: Callable[[int], int] = int) -> Minibatch:
        """`row`: position -> row of the corpus."""
        size, ranks = self._config.microbatch, self._policy.ranks
        tokens = count * self._config.corpus.sequence_length
        minibatch = []
        for first in range(start + self._policy.rank * size, start + count, size * ranks):
            rows = [corpus.rows(row(position), 1, device()) for position in range(first, first + size)]
            parts = (torch.cat([part.tokens for part in rows]), torch.cat([part.labels for part in rows]))
            minibatch.append(from_rows(*parts, tokens))
        return minibatch
