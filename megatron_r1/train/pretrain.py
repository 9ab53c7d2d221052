"""`megatron-r1 pretrain`: next-token prediction over indexed datasets.

::

    corpus rows -> microbatches -> policy.step(cross-entropy + MTP + balance loss) -> checkpoint
                                                    |                                    |
                                                 report                    HF export at the end
"""

import time
from pathlib import Path
from typing import Any

import torch

from megatron_r1.checkpoint.source import weights
from megatron_r1.checkpoint.store import Checkpoints
from megatron_r1.config.load import dump
from megatron_r1.config.runs import PretrainConfig
from megatron_r1.data.pretraining import Corpus
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError
from megatron_r1.loss.cross_entropy import CrossEntropy
from megatron_r1.model import hf_folder
from megatron_r1.model.build import build_model, check_tokenizer, parameter_count
from megatron_r1.model.parallel import device, from_first_rank, initialize, is_first_rank
from megatron_r1.report.run import Report
from megatron_r1.train.batch import Minibatch, from_rows
from megatron_r1.train.policy import Figures, Policy


def run(config: PretrainConfig) -> dict[str, Any]:
    """Pretrain, or go on where the output folder's newest checkpoint stands; ends with an HF export."""
    initialize(config.parallel, config.seed)
    tokenizer = Tokenizer.load(config.tokenizer)
    length = config.corpus.sequence_length
    model = build_model(config.model, length, weights=weights(config.model.path))
    check_tokenizer(model, tokenizer.vocab_size, tokenizer.eos_id)
    policy, loss = Policy(model, config.optim, config.steps), CrossEntropy()
    feed = _Feed(config, tokenizer, policy)
    identity = {"seed": config.seed, "batch": config.batch, "sequence_length": length}
    checkpoints = Checkpoints(config.output / "checkpoints", config.checkpoint, identity)
    start = checkpoints.latest() or 0
    if start:
        checkpoints.load(start, policy.trainable, {})
    report = Report(
        config.output,
        config.report,
        config.report.title or "Pretraining",
        config.steps,
        dump(config),
        start,
        enabled=is_first_rank(),
    )
    with report:
        report.message(f"{parameter_count(model.module):,} parameters, {config.batch * length:,} tokens a step")
        for step in range(start, config.steps):
            if step and step % config.validation_every == 0:
                feed.validate(step, report, loss)
            with report.step(step):
                with report.phase("data"):
                    minibatch = feed.training(step)
                tick = time.perf_counter()
                with report.phase("update"):
                    report.add(policy.step(minibatch, loss))
                report.add({"tokens_per_second": config.batch * length / (time.perf_counter() - tick)})
            if checkpoints.due(step + 1, config.steps):
                with report.phase("checkpoint"):
                    checkpoints.save(step + 1, policy.trainable, {}, {})
        final = feed.validate(config.steps, report, loss)
        folder = config.output / "hf"
        dtype = getattr(torch, config.model.dtype)
        from_first_rank(
            lambda: hf_folder.write(
                folder, model.hf, model.map.export(model.module, dtype), config.tokenizer, config.model.path
            )
        )
        return report.summary(
            {
                "model": str(folder),
                "parameters": parameter_count(model.module),
                "tokens": config.steps * config.batch * length,
                **final,
            }
        )


class _Feed:
    """This rank's microbatches of each step."""

    def __init__(self, config: PretrainConfig, tokenizer: Tokenizer, policy: Policy) -> None:
        unit = config.microbatch * policy.ranks
        if config.batch % unit:
            raise ConfigError(
                f"batch {config.batch} does not divide into microbatch {config.microbatch} x {policy.ranks} ranks"
            )
        self._config, self._tokenizer, self._policy = config, tokenizer, policy
        self._training = self._corpus("train", config.corpus.train, config.steps * config.batch)
        if config.corpus.validation:
            self._validation = self._corpus(
                "validation", config.corpus.validation, config.validation_batches * config.batch
            )

    def training(self, step: int) -> Minibatch:
        """Microbatches of one optimizer step."""
        return self._share(self._training, step * self._config.batch, self._config.batch)

    def validate(self, step: int, report: Report, loss: CrossEntropy) -> Figures:
        """Loss on the validation rows of the policy as it is after `step` steps; empty without such rows."""
        if not self._config.corpus.validation:
            return {}
        rows = self._share(self._validation, 0, self._config.validation_batches * self._config.batch)
        with report.phase("validation"):
            figures = {"validation_loss": self._policy.evaluate(rows, loss)["loss"]}
        report.evaluation(step, figures)
        return figures

    def _corpus(self, name: str, paths: list[Path], rows: int) -> Corpus:
        config = self._config
        cache = config.output / "cache" / name
        return Corpus(paths, self._tokenizer, config.corpus.sequence_length, rows, cache, config.seed)

    def _share(self, corpus: Corpus, start: int, count: int) -> Minibatch:
        size, ranks = self._config.microbatch, self._policy.ranks
        tokens = count * self._config.corpus.sequence_length
        minibatch = []
        for first in range(start + self._policy.rank * size, start + count, size * ranks):
            rows = corpus.rows(first, size, device())
            minibatch.append(from_rows(rows.tokens, rows.labels, tokens))
        return minibatch
