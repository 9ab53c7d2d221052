"""What packing costs and gains: an optimizer step on packed responses against a padded row for each.

    python tools/bench/packing.py examples/r1_tiny/r1_zero.toml

`Policy.step` with the GRPO objective against a loop of Megatron-core's own pieces (`learner.py`), with the same
weights, optimizer and responses, and the same number of forward passes: responses of equal length, where packing has
nothing to save, and of unequal length.

Tokens are those of prompts and responses; padding counts for nothing.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from learner import UPDATES, BareMegatron
from paired import Comparison, measure, parser, report, seconds

from megatron_r1.config import component
from megatron_r1.config.load import load
from megatron_r1.config.runs import RLConfig
from megatron_r1.config.schedule import largest
from megatron_r1.loss.grpo import Grpo
from megatron_r1.model.build import build_model
from megatron_r1.model.parallel import device, initialize
from megatron_r1.model.placement import parameter_counts
from megatron_r1.optim.optimizer import make_trainable
from megatron_r1.train.batch import Minibatch, Share, Trajectory, attach, split, with_inputs
from megatron_r1.train.policy import Policy

Row = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Tokens, labels and weight of each label. [rows, seq]"""


def weighted(batches: Iterator[Row], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
    """The weights make a sum a mean already, so it is divided by one."""
    tokens, labels, weights = next(batches)
    positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    output = model(tokens, positions, None, labels=labels)

    def loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        value = (output * weights).sum()
        return value, torch.ones((), dtype=torch.int, device=output.device), {"loss": value.detach()}

    return output, loss


def responses(config: RLConfig, vocab: int, samples: int, equal: bool) -> list[Trajectory]:
    """Random prompts and responses.

    Response lengths are log-normal (sigma 0.6) around a third of `max_tokens` and cut there, as reasoning traces are:
    most are short, a few hit the limit. With `equal` all have the longest length.
    """
    rng = random.Random(0)
    longest = largest(config.rollout.max_tokens)
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
    twin = build_model(config.model, length)
    bare = BareMegatron(twin, make_trainable(twin, config.optim, UPDATES), weighted)
    vocab, rows = policy.model.hf["vocab_size"], max(capacity // length, 1)
    grpo: Grpo = component.build("loss", config.loss)

    def pair(equal: bool) -> Comparison:
        samples = responses(config, vocab, chosen.samples, equal)
        minibatch, batches = packed(samples, policy, grpo, capacity), padded(samples, rows)
        tokens = sum(sample.length for sample in samples)
        return Comparison(
            f"{'equal' if equal else 'unequal'} lengths, packed, GRPO",
            "tokens/s",
            "bare Megatron-core, one padded row a sample",
            lambda: tokens / seconds(lambda: policy.step(minibatch, grpo)),
            lambda: tokens / seconds(lambda: bare.step(batches)),
            0.9,
        )

    comparisons = [pair(equal=True), pair(equal=False)]
    measure(comparisons, chosen.rounds)
    report(
        "packing",
        comparisons,
        chosen.json,
        parameters=parameter_counts(policy.model.chunks).total,
        samples=chosen.samples,
        longest_sequence=length,
        tokens_per_forward_pass=capacity,
        dtype=config.model.dtype,
        threads=config.parallel.threads,
    )


if __name__ == "__main__":
    main()
