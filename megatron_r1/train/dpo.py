"""`megatron-r1 dpo`: direct preference optimisation on pairs.

The reference policy is the one that training starts from. Its log-probabilities of all responses are computed once,
by the same module before its first update, so no second model is needed.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch.distributed as dist

from megatron_r1.checkpoint.source import weights
from megatron_r1.config.dpo import DPOConfig
from megatron_r1.data.preferences import Pair, hold_out, read_pairs
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.loss.base import Loss
from megatron_r1.loss.dpo import Dpo
from megatron_r1.model.build import build_model, check_tokenizer
from megatron_r1.model.parallel import initialize
from megatron_r1.train.batch import Share, by_sample
from megatron_r1.train.heartbeat import Heartbeat
from megatron_r1.train.policy import Policy
from megatron_r1.train.preference_batch import Item, Text, batch, by_length
from megatron_r1.train.preference_loop import Data, PreferenceLoop, chunks, share_of, updates, usable


def run(config: DPOConfig) -> dict[str, Any]:
    """Train, or go on where the output folder's newest checkpoint stands; ends with an HF export."""
    initialize(config.parallel, config.seed, config.model.kernels)
    ranks = dist.get_rank(), dist.get_world_size()
    with Heartbeat(config.output, config.guard, *ranks, "megatron-r1 dpo") as heartbeat:
        return _train(config, heartbeat)


def _train(config: DPOConfig, heartbeat: Heartbeat) -> dict[str, Any]:
    tokenizer = Tokenizer.load(config.tokenizer or config.model.path)
    data = read(config, tokenizer)
    model = build_model(config.model, config.max_length, "vocabulary", weights(config.model.path))
    check_tokenizer(model, tokenizer.vocab_size, tokenizer.eos_id)
    policy = Policy(model, config.optim, updates(config, data))
    loss = Dpo(config.beta, config.length_normalised, config.label_smoothing)
    share = share_of(policy, config)
    data.training = with_reference(policy, data.training, loss, share)  # still the starting weights, resumed or not
    data.heldout = with_reference(policy, data.heldout, loss, share)
    return PreferenceLoop(config, policy, tokenizer, loss, data).run("Direct preference optimisation", heartbeat)


def read(config: DPOConfig, tokenizer: Tokenizer) -> Data:
    """The pairs of the run as token ids.

    Raises:
        DataError: bad rows, or none left to train on.
    """
    sides = hold_out(read_pairs(config.data), lambda row: row.prompt, config.heldout_share, config.seed)
    training, heldout = ([as_item(pair, tokenizer) for pair in side] for side in sides)
    return usable(training, heldout, config.max_length)


def as_item(pair: Pair, tokenizer: Tokenizer) -> Item | None:
    """A pair of whole responses, each judged from its first token to its end-of-sequence; None if they are the same."""
    prompt = tokenizer.encode_prompt(pair.prompt)
    chosen, rejected = (_text(prompt, tokenizer, response) for response in (pair.chosen, pair.rejected))
    if chosen == rejected:
        return None
    return Item((chosen, rejected), stratum=by_length(chosen, rejected))


def with_reference(policy: Policy, items: Sequence[Item], loss: Loss, share: Share) -> list[Item]:
    """The items with the log-probabilities of their texts under the policy as it is. Each rank computes its part."""
    found: list[Item] = []
    for part in chunks(items):
        mine = batch(part, loss, share)
        sums = {number: float(values.sum()) for number, values in by_sample(mine, policy.logprobs(mine))}
        of_ranks: list[dict[int, float]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(of_ranks, sums)
        known = {number: value for theirs in of_ranks for number, value in theirs.items()}
        in_order = iter(known[number] for number in sorted(known))
        found += [replace(item, reference=tuple(islice(in_order, len(item.texts)))) for item in part]
    return found


def _text(prompt: list[int], tokenizer: Tokenizer, response: str) -> Text:
    answer = [*tokenizer.encode(response), tokenizer.eos_id]
    tokens = prompt + answer
    return Text(tokens[:-1], tokens[1:], judged=len(answer))
