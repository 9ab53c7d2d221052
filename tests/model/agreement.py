"""One model in both implementations, Megatron's and transformers', and what must be equal."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from transformers import PreTrainedModel

from megatron_r1.model.build import BuiltModel


@dataclass
class Pair:
    """The same weights in both implementations."""

    folder: Path
    ours: BuiltModel
    theirs: PreTrainedModel


def cross_entropy(model: BuiltModel, tokens: torch.Tensor, packing: PackedSeqParams | None = None) -> torch.Tensor:
    positions = torch.arange(tokens.size(1) - 1).expand(tokens.size(0), -1)
    loss: torch.Tensor = model.module(tokens[:, :-1], positions, None, labels=tokens[:, 1:], packed_seq_params=packing)
    return loss


def logits(model: BuiltModel, tokens: torch.Tensor) -> torch.Tensor:
    """Of the main head, which comes after those of MTP layers; Megatron runs these only when there are labels."""
    seen: list[torch.Tensor] = []
    # Cloned, because Megatron's cross-entropy works in place.
    handle = model.module.output_layer.register_forward_hook(lambda _, args, output: seen.append(output[0].clone()))
    positions = torch.arange(tokens.size(1)).expand(tokens.size(0), -1)
    with torch.no_grad():
        model.module(tokens, positions, None, labels=tokens)
    handle.remove()
    return seen[-1].transpose(0, 1)


def logits_agree(pair: Pair, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        expected = pair.theirs(tokens).logits
    assert expected.std() > 0.3, "logits too flat to tell models apart: a larger initializer_range is needed"
    torch.testing.assert_close(logits(pair.ours, tokens), expected, atol=1e-4, rtol=0)


def gradients_agree(pair: Pair, tokens: torch.Tensor) -> None:
    """Of the mean cross-entropy, in each tensor of the checkpoint."""
    pair.ours.module.zero_grad()
    cross_entropy(pair.ours, tokens).mean().backward()
    pair.theirs.zero_grad()
    F.cross_entropy(pair.theirs(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    ours = {name: parameter.grad for name, parameter in pair.ours.module.named_parameters()}
    found = {
        name: gradient
        for rule in pair.ours.map.rules
        if rule.megatron in ours  # a selection bias has no gradient
        for name, gradient in zip(rule.hf, rule.cut(ours[rule.megatron]), strict=True)
    }
    expected = released_gradients(pair.theirs)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-3 * gradient.norm(), name


def released_gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Gradients by the names of the released checkpoints: transformers keeps a layer's experts in two stacks."""
    mixtral = model.config.model_type == "mixtral"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    result = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        released = name.replace(".mlp.", ".block_sparse_moe.") if mixtral else name
        prefix, _, kind = released.partition(".experts.")
        if not kind:
            result[released] = parameter.grad
            continue
        for expert, stacked in enumerate(parameter.grad):
            parts = zip((gate, up), stacked.chunk(2), strict=True) if kind == "gate_up_proj" else [(down, stacked)]
            result.update({f"{prefix}.experts.{expert}.{part}.weight": gradient for part, gradient in parts})
    return result


def packing_agrees(model: BuiltModel, tokens: torch.Tensor) -> None:
    """Texts of 48, 20 and 31 tokens in one row, each as if it were alone."""
    lengths = [48, 20, 31]
    texts = [tokens[row % tokens.size(0), : length + 1] for row, length in enumerate(lengths)]
    ends = torch.tensor([0, 48, 68, 99], dtype=torch.int32)
    packing = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=48, max_seqlen_kv=48
    )
    inputs, labels = (torch.cat([text[cut] for text in texts])[None] for cut in (slice(0, -1), slice(1, None)))
    positions = torch.arange(99)[None]
    with torch.no_grad():
        together = model.module(inputs, positions, None, labels=labels, packed_seq_params=packing)[0]
        alone = torch.cat([cross_entropy(model, text[None])[0] for text in texts])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)
