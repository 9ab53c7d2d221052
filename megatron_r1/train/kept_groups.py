"""Judged groups as a checkpoint keeps them: plain values and tensors, without what the question's position says."""

from typing import Any

import torch

from megatron_r1.types import Group, Question, Sample


def pack(group: Group) -> dict[str, Any]:
    """Of a group that is judged and not trained on."""
    samples = group.samples
    return {
        "lengths": [len(sample.tokens) for sample in samples],
        "sampled": [sample.length for sample in samples],
        "tokens": torch.tensor([token for sample in samples for token in sample.tokens], dtype=torch.int32),
        "logprobs": torch.tensor([lp for sample in samples for lp in sample.logprobs], dtype=torch.float32),
        "samples": [_rest(sample) for sample in samples],
    }


def unpack(packed: dict[str, Any], question: Question, prompt: list[int]) -> Group:
    """The group again."""
    tokens = packed["tokens"].split(packed["lengths"])
    logprobs = packed["logprobs"].split(packed.get("sampled", packed["lengths"]))
    rest = packed["samples"]
    parts = zip(tokens, logprobs, rest, strict=True)
    return Group(question, prompt, [Sample(tokens=t.tolist(), logprobs=lp.tolist(), **more) for t, lp, more in parts])


def _rest(sample: Sample) -> dict[str, Any]:
    names = ("text", "finished", "weight_version", "rewards", "reward", "correct")
    lists = ("weight_spans", "step_marks", "step_rewards", "mask")
    return {name: getattr(sample, name) for name in (*names, "answer_from", *lists)}
