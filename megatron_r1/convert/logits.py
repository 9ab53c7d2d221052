"""What two checkpoints say about real text, each through the Megatron model."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from megatron_r1.checkpoint.source import Source, SourceWeights, open_source
from megatron_r1.config.inspect import VerifyConfig
from megatron_r1.config.sections import ModelSection, ParallelSection
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError
from megatron_r1.model.build import BuiltModel, build_model
from megatron_r1.model.parallel import initialize
from megatron_r1.model.scalar_head import is_classifier

_POSITIONS = 64
"""Whose distributions are compared at once, in float64."""


def compare_logits(config: VerifyConfig, text: Path) -> dict[str, Any]:
    """Run both models on a text, one after the other.

    Args:
        config: two checkpoints of one vocabulary, in any formats.
        text: a file.

    Returns:
        `tokens`; `max_difference` of two logits; `kl_mean` and `kl_max`, the divergence KL(a || b) at a position in
        nats; `top1_agreement`, the share of positions with the same likeliest token; `loss_a` and `loss_b`, mean
        cross-entropy of the text in nats.

    Raises:
        DataError: no tokenizer, a reward model, no text, or vocabularies of different sizes.
    """
    initialize(ParallelSection(threads=0), seed=0)
    first, second = (open_source(path, config.config, mtp=False) for path in (config.a, config.b))
    texts = _sequences(first, second, config, text)
    before = list(_logits(first, texts, config.text_dtype))  # so that there is one model at a time
    length, largest, agreed = 0, 0.0, 0
    divergences: list[torch.Tensor] = []
    losses = [0.0, 0.0]
    for tokens, ours, theirs in zip(texts, before, _logits(second, texts, config.text_dtype), strict=True):
        if ours.shape != theirs.shape:
            raise DataError(
                f"{config.a} has {ours.size(1)} logits a token, {config.b} has {theirs.size(1)}: not comparable"
            )
        length += len(tokens)
        largest = max(largest, float((ours - theirs).abs().max()))
        agreed += int((ours.argmax(1) == theirs.argmax(1)).sum())
        divergences.append(_divergence(ours, theirs))
        for index, own in enumerate((ours, theirs)):
            losses[index] += float(F.cross_entropy(own[:-1], tokens[1:], reduction="sum"))
    divergence, predicted = torch.cat(divergences), length - len(texts)
    return {
        "tokens": length,
        "max_difference": largest,
        "kl_mean": float(divergence.mean()),
        "kl_max": float(divergence.max()),
        "top1_agreement": agreed / length,
        "loss_a": losses[0] / predicted,
        "loss_b": losses[1] / predicted,
    }


def _sequences(first: Source, second: Source, config: VerifyConfig, file: Path) -> list[torch.Tensor]:
    """The text as token ids, cut to what both models can see. [tokens] each"""
    folders = [source.folder for source in (first, second) if (source.folder / "tokenizer.json").exists()]
    tokenizer = Tokenizer.load(folders[0] if folders else first.folder)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the text {file}: {error}") from error
    ids = tokenizer.encode(text[: 32 * config.text_tokens])[: config.text_tokens]
    limits = [source.hf.get("max_position_embeddings", config.text_length) for source in (first, second)]
    length = min(config.text_length, *limits)
    found = [piece for piece in torch.tensor(ids).split(length) if len(piece) > 1] if ids else []
    if not found:
        raise DataError(f"{file} holds no text of two tokens")
    return found


def _logits(source: Source, texts: list[torch.Tensor], dtype: str) -> Iterator[torch.Tensor]:
    """Of each text in turn. [tokens, vocabulary] in float32"""
    if is_classifier(source.hf):
        raise DataError(f"{source.folder} is a reward model: it has no logits to compare")
    model = _build(source, max(map(len, texts)), dtype)
    model.module.eval()
    with torch.no_grad():
        for tokens in texts:
            yield model.module(tokens[None], torch.arange(len(tokens))[None], None)[0].float()


def _build(source: Source, length: int, dtype: str) -> BuiltModel:
    """The model of a source of any format: built from its config.json, then filled."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(source.hf))
        section = ModelSection.model_validate({"path": Path(folder), "dtype": dtype, "load_weights": False})
        model = build_model(section, length)
    model.map.load(model.chunks, SourceWeights(source))
    return model


def _divergence(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """KL(ours || theirs) at each position, nats. [tokens]"""
    found = []
    for x, y in zip(ours.split(_POSITIONS), theirs.split(_POSITIONS), strict=True):
        p, q = (F.log_softmax(logits.double(), dim=-1) for logits in (x, y))
        found.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(found)
