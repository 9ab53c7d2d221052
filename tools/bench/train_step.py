"""Tokens per second of an optimizer step: `Policy.step` against a bare Megatron-core loop.

    python tools/bench/train_step.py examples/r1_tiny/r1_zero.toml

The bare loop is what one writes from Megatron-core's own pieces: `GPTModel` in its data-parallel wrapper, forward,
`loss.backward()`, `finalize_model_grads`, the optimizer's step. Both have the same weights, optimizer and tokens,
and the same number of forward passes. Three pairs:

* rows of equal length with the cross-entropy, as in pretraining: the cost of `Policy`;
* responses of equal length with the GRPO objective, packed, against the same as rows: the cost of packing;
* responses of unequal length, packed, against the same padded to the longest: what packing gains.

Tokens are those of prompts and responses; padding counts for nothing.
"""

import random

import torch
from paired import Comparison, measure, parser, report, seconds

from megatron_r1.config import component
from megatron_r1.config.load import load
from megatron_r1.config.runs import RLConfig
from megatron_r1.loss.base import Loss
from megatron_r1.loss.cross_entropy import CrossEntropy
from megatron_r1.loss.grpo import Grpo
from megatron_r1.model.build import BuiltModel, build_model, parameter_count
from megatron_r1.model.parallel import device, initialize
from megatron_r1.optim.optimizer import make_trainable
from megatron_r1.train.batch import Minibatch, Share, Trajectory, attach, from_rows, split, with_inputs
from megatron_r1.train.policy import Policy

Row = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Tokens, labels and weight of each label. [rows, seq]"""
UPDATES = 1000
"""Length of the schedule; more than are made."""


class BareMegatron:
    """Megatron-core's own pieces and a loop."""

    def __init__(self, model: BuiltModel, config: RLConfig) -> None:
        # Here, because on CPU megatron_r1.model must have prepared Megatron before anything imports it.
        from megatron.core.distributed import finalize_model_grads

        self.trainable = make_trainable(model, config.optim, UPDATES)
        self.finalize = finalize_model_grads

    def step(self, batches: list[Row]) -> None:
        """One optimizer update on the weighted cross-entropy."""
        ddp, optimizer = self.trainable.ddp, self.trainable.optimizer
        ddp.train()
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        for tokens, labels, weights in batches:
            positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
            loss = (ddp(tokens, positions, None, labels=labels) * weights).sum()
            loss.backward()
        self.finalize([ddp])
        optimizer.step()
        self.trainable.scheduler.step(1)


def pretraining(config: RLConfig, vocab: int, rows: int, microbatches: int) -> tuple[Minibatch, list[Row]]:
    """The same random rows of the model's longest sequence, for both."""
    length = config.rollout.max_model_len
    ours, bare = [], []
    for _ in range(microbatches):
        text = torch.randint(3, vocab, (rows, length + 1), device=device())
        tokens, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        total = rows * length * microbatches
        ours.append(from_rows(tokens, labels, total))
        bare.append((tokens, labels, torch.full(tokens.shape, 1 / total, device=tokens.device)))
    return ours, bare


def rollout(config: RLConfig, vocab: int, samples: int, equal: bool) -> list[Trajectory]:
    """Random prompts and responses.

    Response lengths are log-normal (sigma 0.6) around a third of `max_tokens` and cut there, as reasoning traces are:
    most are short, a few hit the limit. With `equal` all have the longest length.
    """
    rng = random.Random(0)
    longest = config.rollout.max_tokens
    prompt = config.rollout.max_model_len - longest
    made = []
    for _ in range(samples):
        drawn = round(rng.lognormvariate(0, 0.6) * longest / 3)
        response = longest if equal else min(max(drawn, 1), longest)
        head = prompt if equal else rng.randint(prompt // 2, prompt)
        tokens = [rng.randrange(3, vocab) for _ in range(head + response)]
        made.append(Trajectory(tokens, response, [-1.0] * response))
    return made


def advantage(sample: Trajectory) -> float:
    """Any number that the sample alone decides."""
    return random.Random(sample.tokens[-1]).gauss(0, 1)


def padded(samples: list[Trajectory], rows: int) -> list[Row]:
    """One row a sample, `rows` of them in a forward pass, filled up to the longest of the pass."""
    batches = []
    for start in range(0, len(samples), rows):
        part = samples[start : start + rows]
        shape = (len(part), max(sample.length for sample in part))
        tokens, labels = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        weights = torch.zeros(shape)
        for row, sample in enumerate(part):
            tokens[row, : sample.length] = torch.tensor(sample.tokens[:-1])
            labels[row, : sample.length] = torch.tensor(sample.tokens[1:])
            response = slice(sample.length - sample.response_length, sample.length)
            weights[row, response] = advantage(sample) / (sample.response_length * len(samples))
        batches.append((tokens.to(device()), labels.to(device()), weights.to(device())))
    return batches


def packed(samples: list[Trajectory], policy: Policy, loss: Grpo, capacity: int) -> Minibatch:
    """The samples as one minibatch of packs, with old and reference log-probabilities."""
    share = Share(rank=0, ranks=1, capacity=capacity, device=device())
    minibatch = next(split(samples, 1, 0, loss, share))
    old = policy.logprobs(minibatch)
    ready = attach(minibatch, advantages=[[advantage(s)] * s.response_length for s in samples])
    return with_inputs(ready, old_logprobs=old, ref_logprobs=[value - 0.1 for value in old])


def main() -> None:
    options = parser(__doc__, rounds=10)
    options.add_argument("--samples", type=int, default=64, help="responses of an update (default %(default)s)")
    chosen, overrides = options.parse_known_args()
    config = load(chosen.run, overrides, RLConfig)
    initialize(config.parallel, config.seed)
    length, capacity = config.rollout.max_model_len, config.tokens_per_microbatch
    policy = Policy(build_model(config.model, length), config.optim, UPDATES, config.rollout.temperature)
    bare = BareMegatron(build_model(config.model, length), config)
    vocab, rows = policy.model.hf["vocab_size"], max(capacity // length, 1)
    grpo: Grpo = component.build("loss", config.loss)

    def pair(name: str, against: str, loss: Loss, work: tuple[Minibatch, list[Row]], tokens: int) -> Comparison:
        minibatch, batches = work
        return Comparison(
            name,
            "tokens/s",
            against,
            lambda: tokens / seconds(lambda: policy.step(minibatch, loss)),
            lambda: tokens / seconds(lambda: bare.step(batches)),
            0.9,
        )

    passes = max(chosen.samples // rows, 1)
    comparisons = [
        pair(
            "rows, cross-entropy",
            "bare Megatron, the same rows",
            CrossEntropy(),
            pretraining(config, vocab, rows, passes),
            rows * passes * length,
        )
    ]
    for equal, name in ((True, "equal lengths, packed, GRPO"), (False, "unequal lengths, packed, GRPO")):
        samples = rollout(config, vocab, chosen.samples, equal)
        work = packed(samples, policy, grpo, capacity), padded(samples, rows)
        tokens = sum(sample.length for sample in samples)
        comparisons.append(pair(name, "bare Megatron, one padded row a sample", grpo, work, tokens))
    measure(comparisons, chosen.rounds)
    report(
        "optimizer step",
        comparisons,
        chosen.json,
        parameters=parameter_count(policy.model.module),
        samples=chosen.samples,
        longest_sequence=length,
        tokens_per_forward_pass=capacity,
        dtype=config.model.dtype,
        threads=config.parallel.threads,
    )


if __name__ == "__main__":
    main()
