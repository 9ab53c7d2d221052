"""The loop that `reward-model` and `dpo` share.

::

    items -> batches of an epoch -> packs -> policy.step(loss) -> checkpoint
      |                                          |                    |
      +- held out: measured before and after   report       HF export at the end
"""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1.checkpoint.store import Checkpoints
from megatron_r1.config.load import dump
from megatron_r1.config.preference_run import PreferenceRunConfig
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError
from megatron_r1.loss.base import Loss
from megatron_r1.model import hf_folder, lora
from megatron_r1.model.family import HFConfig
from megatron_r1.model.parallel import consumed_by_first_rank, is_first_rank
from megatron_r1.model.placement import parameter_counts
from megatron_r1.report.run import Report
from megatron_r1.train import memory
from megatron_r1.train.batch import Minibatch, Share
from megatron_r1.train.guard import Guard
from megatron_r1.train.heartbeat import Heartbeat
from megatron_r1.train.policy import Figures, Policy, TrainedModel
from megatron_r1.train.preference_batch import Item, batch, batches
from megatron_r1.train.throughput import Throughput
from megatron_r1.wording import counted

EVALUATION_ITEMS = 1024
"""Held-out items whose microbatches are in memory at once."""


@dataclass
class Data:
    """What is trained on, what is held out, and how much was left out."""

    training: list[Item]
    heldout: list[Item]
    counts: dict[str, int]

    def digest(self) -> int:
        """Of what is trained on, by content: a run that goes on has to meet the same."""
        found = hashlib.blake2b(digest_size=8)
        for item in self.training:
            found.update(repr((item.label, [(text.tokens, text.judged) for text in item.texts])).encode())
        return int.from_bytes(found.digest(), "big") >> 1


def usable(training: Sequence[Item | None], heldout: Sequence[Item | None], max_length: int) -> Data:
    """Leave out and count what cannot be learned from: None (nothing to compare), texts above `max_length` tokens.

    Raises:
        DataError: nothing is left to train on.
    """
    counts = {"training": 0, "heldout": 0, "unusable": 0, "too_long": 0}
    sides: dict[str, list[Item]] = {"training": [], "heldout": []}
    for name, items in (("training", training), ("heldout", heldout)):
        for item in items:
            if item is None:
                counts["unusable"] += 1
            elif max(len(text.tokens) for text in item.texts) > max_length:
                counts["too_long"] += 1
            else:
                sides[name].append(item)
        counts[name] = len(sides[name])
    if not sides["training"]:
        raise DataError(
            f"no row is left to train on: {counts['too_long']} are longer than max_length = {max_length} tokens, "
            f"{counts['unusable']} have no two parts to compare or none to score, {counts['heldout']} are held out"
        )
    return Data(**sides, counts=counts)


class PreferenceLoop:
    """Trains a policy, or a scorer, on preferences.

    Args:
        config: the run.
        policy: the policy or scorer that is trained, with the updates that `updates` says.
        tokenizer: the model's.
        loss: pairwise, pointwise or DPO.
        data: items, with reference log-probabilities where the loss needs them.
    """

    def __init__(
        self, config: PreferenceRunConfig, policy: TrainedModel, tokenizer: Tokenizer, loss: Loss, data: Data
    ) -> None:
        self.config, self.policy, self.tokenizer, self.loss, self.data = config, policy, tokenizer, loss, data
        self.share = share_of(policy, config)
        self._throughput = Throughput(policy.model, dist.get_world_size())

    def run(self, title: str, heartbeat: Heartbeat, closing: Callable[[], Figures] = dict) -> dict[str, Any]:
        """Train, or go on where the newest checkpoint stands; returns the summary.

        Args:
            title: what the run is called unless the config says.
            heartbeat: is told how far this rank has come.
            closing: further figures of the trained model for the summary.
        """
        config, policy = self.config, self.policy
        steps, per_epoch = updates(config, self.data), math.ceil(len(self.data.training) / config.batch)
        identity = {"seed": config.seed, "batch": config.batch, "data": self.data.digest()}
        checkpoints = Checkpoints(config.output / "checkpoints", config.checkpoint, identity, self._describe)
        start = checkpoints.latest() or 0
        carried = checkpoints.load(start, policy.trainable, {}) if start else {}
        named, first = config.report.title or title, is_first_rank()
        report = Report(config.output, config.report, named, steps, dump(config), start, first, heartbeat.beat)
        guard = Guard(config.guard, config.output, dist.get_rank(), report.message)
        base = guard.restore(carried)
        with report, checkpoints.running(report.message):
            report.message(self._arithmetic(steps))
            report.message(policy.model.kernels.said)
            if not start:
                base = self.measure(report, 0)
            for step in range(start, steps):
                if step % per_epoch == 0 or step == start:
                    epoch = list(batches(self.data.training, config.batch, config.seed, step // per_epoch))
                self._step(report, guard, step, epoch[step % per_epoch])
                if checkpoints.due(step + 1, steps):
                    with report.phase("checkpoint"):
                        checkpoints.save(step + 1, policy.trainable, {}, base | guard.state())
            final = self.measure(report, steps)
            with report.phase("validation"):
                more = closing()
            with report.phase("export"):
                self._save_model()
            return report.summary(self._summary(steps, base, final) | more)

    def measure(self, report: Report, step: int) -> Figures:
        """The loss's figures over the held-out items after `step` steps, and the accuracy of each kind of item."""
        with report.phase("validation"):
            parts = [(name, len(items), self._evaluate(items)) for name, items in self._strata().items()]
        total = sum(count for _, count, _ in parts)
        if not total:
            return {}
        figures = {
            f"heldout_{name}": round(sum(count * part[name] for _, count, part in parts) / total, 6) + 0.0
            for name in parts[0][2]
        }
        figures |= {f"heldout_accuracy/{name}": round(part["accuracy"], 6) for name, _, part in parts}
        report.evaluation(step, figures)
        return figures

    def _strata(self) -> dict[str, list[Item]]:
        names = sorted({item.stratum for item in self.data.heldout})
        return {name: [item for item in self.data.heldout if item.stratum == name] for name in names}

    def _evaluate(self, items: list[Item]) -> Figures:
        """The loss's figures, averaged over items."""
        totals: Figures = {}
        for part in chunks(items):
            for name, value in self.policy.evaluate(batch(part, self.loss, self.share), self.loss).items():
                totals[name] = totals.get(name, 0.0) + value * len(part) / len(items)
        return totals

    def _step(self, report: Report, guard: Guard, step: int, items: list[Item]) -> None:
        with report.step(step):
            tick = time.perf_counter()
            with report.phase("update"):
                minibatch = batch(items, self.loss, self.share)
                report.add(self.policy.step(minibatch, self.loss, guard.judge))
                guard.follow_up(step, minibatch, self._said)
            lengths = [len(text.tokens) for item in items for text in item.texts]
            report.add(self._throughput.figures(lengths, time.perf_counter() - tick) | memory.peak())

    def _said(self, minibatch: Minibatch) -> list[torch.Tensor]:
        """Of each judged token a policy's loss, or a scorer's score."""
        sign = -1 if isinstance(self.policy, Policy) else 1
        return [sign * values for values in self.policy.outputs(minibatch)]

    def _summary(self, steps: int, base: Figures, final: Figures) -> dict[str, Any]:
        """Of each figure its value before and after; how many held-out rows are of each kind."""
        rows = {f"rows_{name}": count for name, count in self.data.counts.items()}
        strata = {f"heldout_rows/{name}": len(items) for name, items in self._strata().items()}
        before = {f"{name}_base": value for name, value in base.items()}
        after = {f"{name}_final": value for name, value in final.items()}
        return {"model": str(self.config.output / "hf"), "steps": steps, **rows, **strata, **before, **after}

    def _arithmetic(self, steps: int) -> str:
        counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in self.data.counts.items())
        model = self.policy.model
        size = lora.size(parameter_counts(model.chunks), model.config.params_dtype)
        return f"{size}; rows: {counts}; {counted(steps, 'step')} of {self.config.batch}"

    def _save_model(self) -> None:
        """Write the trained model as a Hugging Face folder."""
        config, hf = self.config, self._hf
        consumed_by_first_rank(
            lambda tensors: hf_folder.write(config.output / "hf", hf, tensors, *self._sources),
            self.policy.model.export(getattr(torch, config.model.dtype)),
        )

    def _describe(self, folder: Path) -> None:
        """Write beside weights what model they are of."""
        hf_folder.describe(folder, self._hf, *self._sources)

    @property
    def _hf(self) -> HFConfig:
        """The model's `config.json`, which names its padding token if that is a token apart."""
        hf, tokenizer = self.policy.model.hf, self.tokenizer
        return hf if tokenizer.pad_id == tokenizer.eos_id else {**hf, "pad_token_id": tokenizer.pad_id}

    @property
    def _sources(self) -> tuple[Path, Path]:
        """Where the tokenizer stands, and other files of the model."""
        return self.config.tokenizer or self.config.model.path, self.config.model.path


def updates(config: PreferenceRunConfig, data: Data) -> int:
    """Optimizer steps of the whole run."""
    return config.epochs * math.ceil(len(data.training) / config.batch)


def share_of(policy: TrainedModel, config: PreferenceRunConfig) -> Share:
    """This rank's part of every batch."""
    return policy.share(config.tokens_per_microbatch)


def chunks(items: Sequence[Item]) -> list[Sequence[Item]]:
    """`items` in parts of at most `EVALUATION_ITEMS`."""
    return [items[start : start + EVALUATION_ITEMS] for start in range(0, len(items), EVALUATION_ITEMS)]
