"""`megatron-r1 reward-model`: a scalar head on a causal model learns to score responses.

DeepSeek-R1 v2, section 3.1: the helpful one from pairs, on the final summary; the safety one from labels, on the whole
response. A text is scored at its last token, the end-of-sequence.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1.checkpoint.source import weights
from megatron_r1.config.reward_model import RewardModelConfig
from megatron_r1.data.preferences import Labelled, Pair, hold_out, read_labels, read_pairs
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.loss.base import Loss
from megatron_r1.loss.pairwise import Pairwise
from megatron_r1.loss.pointwise import Pointwise
from megatron_r1.model.build import build_model, check_tokenizer
from megatron_r1.model.parallel import device, initialize
from megatron_r1.reward.response import Part, scored_part
from megatron_r1.train.heartbeat import Heartbeat
from megatron_r1.train.policy import Figures
from megatron_r1.train.preference_batch import Item, Text, batch, by_length
from megatron_r1.train.preference_loop import Data, PreferenceLoop, chunks, updates, usable
from megatron_r1.train.scorer import Scorer

_OPEN = "<think>"
"""What a template may have put at the end of the prompt, so that the response lacks it."""


def run(config: RewardModelConfig) -> dict[str, Any]:
    """Train, or go on where the output folder's newest checkpoint stands; ends with an HF export."""
    initialize(config.parallel, config.seed, config.model.kernels)
    ranks = dist.get_rank(), dist.get_world_size()
    with Heartbeat(config.output, config.guard, *ranks, "megatron-r1 reward-model") as heartbeat:
        return _train(config, heartbeat)


def _train(config: RewardModelConfig, heartbeat: Heartbeat) -> dict[str, Any]:
    tokenizer = Tokenizer.load(config.tokenizer or config.model.path)
    data = read(config, tokenizer)
    model = build_model(config.model, config.max_length, "scalar", weights(config.model.path))
    check_tokenizer(model, tokenizer.vocab_size, tokenizer.eos_id)
    loss: Loss = Pairwise() if config.kind == "pairwise" else Pointwise()
    scorer = Scorer(model, config.optim, updates(config, data))
    loop = PreferenceLoop(config, scorer, tokenizer, loss, data)
    return loop.run("Reward model", heartbeat, closing=lambda: score_scale(scorer, data.heldout or data.training, loop))


def score_scale(scorer: Scorer, items: list[Item], loop: PreferenceLoop) -> Figures:
    """Mean and standard deviation of the scores of `items`: what puts a reward of this model on a scale of its own."""
    totals = torch.zeros(3, dtype=torch.float64, device=device())
    for part in chunks(items):
        scores = torch.cat(scorer.values(batch(part, loop.loss, loop.share))).double()
        totals += torch.stack([torch.ones_like(scores).sum(), scores.sum(), scores.square().sum()])
    dist.all_reduce(totals)
    mean, square = (totals[1:] / totals[0]).tolist()
    return {"score_mean": mean, "score_std": math.sqrt(max(square - mean * mean, 0.0))}


def read(config: RewardModelConfig, tokenizer: Tokenizer) -> Data:
    """The rows of the run as token ids.

    Raises:
        DataError: bad rows, or none left to train on.
    """
    texts = Texts(tokenizer, config.part)
    training: Sequence[Item | None]
    heldout: Sequence[Item | None]
    if config.kind == "pairwise":
        pairs = hold_out(read_pairs(config.data), lambda row: row.prompt, config.heldout_share, config.seed)
        training, heldout = ([texts.pair(pair) for pair in side] for side in pairs)
    else:
        labels = hold_out(read_labels(config.data), lambda row: row.prompt, config.heldout_share, config.seed)
        training, heldout = ([texts.labelled(row) for row in side] for side in labels)
    return usable(training, heldout, config.max_length)


class Texts:
    """Rows -> what a reward model reads.

    Args:
        tokenizer: the model's.
        part: what of a response is scored.
    """

    def __init__(self, tokenizer: Tokenizer, part: Part) -> None:
        self.tokenizer, self.part = tokenizer, part

    def pair(self, pair: Pair) -> Item | None:
        """None where the scored parts are the same, or one of the two is not there."""
        chosen, rejected = self.scored(pair.prompt, pair.chosen), self.scored(pair.prompt, pair.rejected)
        if chosen is None or rejected is None or chosen == rejected:
            return None
        return Item((chosen, rejected), stratum=by_length(chosen, rejected))

    def labelled(self, row: Labelled) -> Item | None:
        """A response with its label; None where the part to score is not there."""
        text = self.scored(row.prompt, row.response)
        stratum = "safe" if row.label else "unsafe"
        return None if text is None else Item((text,), stratum=stratum, label=float(row.label))

    def scored(self, prompt: str, response: str) -> Text | None:
        """[bos] prompt, the scored part of the response, [eos]; judged at its last token.

        None without such a part: a response whose reasoning never closes has no summary, and no score in RL either.
        """
        opened = self.part == "summary" and prompt.rstrip().endswith(_OPEN)
        part = scored_part(_OPEN + response if opened else response, self.part)
        if not part:
            return None
        tokens = [*self.tokenizer.encode_prompt(prompt), *self.tokenizer.encode(part), self.tokenizer.eos_id]
        return Text(tokens, labels=tokens, judged=1)
