"""Groups as a checkpoint keeps them: plain values and tensors, without what the question's position says."""

from collections.abc import Sequence
from typing import Any

import torch

from megatron_r1.rollout.responses import Response
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
    parts = zip(tokens, logprobs, map(_restored, rest), strict=True)
    return Group(question, prompt, [Sample(tokens=t.tolist(), logprobs=lp.tolist(), **more) for t, lp, more in parts])


def pack_begun(responses: Sequence[Response]) -> list[dict[str, Any]]:
    """Of a group that is not complete: samples that are, and beginnings of others."""
    return [
        response.model_dump(exclude={"routed_experts"})
        | _experts(response)
        | {
            "tokens": torch.tensor(response.tokens, dtype=torch.int32),
            "logprobs": torch.tensor(response.logprobs, dtype=torch.float32),
        }
        for response in responses
    ]


def unpack_begun(packed: Sequence[dict[str, Any]]) -> list[Response]:
    """The same again."""
    lists = [one | {name: one[name].tolist() for name in ("tokens", "logprobs")} for one in packed]
    return [Response.model_construct(**_restored(one)) for one in lists]


def _restored(rest: dict[str, Any]) -> dict[str, Any]:
    return rest | ({"routed_experts": rest["routed_experts"].numpy()} if "routed_experts" in rest else {})


def _rest(sample: Sample) -> dict[str, Any]:
    names = ("text", "finished", "weight_version", "rewards", "reward", "correct")
    lists = ("weight_spans", "step_marks", "step_rewards", "mask")
    rest = {name: getattr(sample, name) for name in (*names, "answer_from", *lists)}
    return rest | _experts(sample)


def _experts(recorded: Sample | Response) -> dict[str, Any]:
    experts = recorded.routed_experts
    return {} if experts is None else {"routed_experts": torch.from_numpy(experts)}
