"""What is wrong with a layout, in numbers: what Megatron would refuse, and what it would do badly."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_r1.config.sections import ParallelSection
from megatron_r1.model.family import HFConfig
from megatron_r1.model.layout_check import options_of, uncut
from megatron_r1.model.memory import Shape
from megatron_r1.plan.run_file import Load

_ROUNDED = 0.02
"""A batch of packed rows does not divide exactly."""


@dataclass(frozen=True)
class Finding:
    """Something to know about a layout."""

    kind: Literal["illegal", "does not fit", "unwise"]
    text: str


def illegal(shape: Shape, hf: HFConfig, parallel: ParallelSection, gpus: int) -> Iterator[Finding]:
    """What cannot be started, as a run would find on the machines (`model/layout_check.py`)."""
    for text in _indivisible(parallel, gpus):
        yield Finding("illegal", text)
    for text in uncut(hf, options_of(parallel)):
        parts = parallel.pipeline * parallel.virtual_pipeline
        better = f" such as {balanced(shape, parts)!r}" if text.endswith("write a pipeline_layout") else ""
        yield Finding("illegal", text + better)


def too_long(hf: HFConfig, length: int) -> Iterator[Finding]:
    """Sequences that a run would refuse."""
    limit = hf.get("max_position_embeddings", length)
    if length > limit:
        yield Finding("illegal", f"sequences of {length:,} tokens exceed the model's max_position_embeddings {limit:,}")


def _indivisible(own: ParallelSection, gpus: int) -> Iterator[str]:
    dense, routed = own.tensor * own.context * own.pipeline, own.expert * own.expert_tensor * own.pipeline
    for by, ranks in (
        (f"tensor {own.tensor} x context {own.context} x pipeline {own.pipeline} = {dense}", dense),
        (f"expert {own.expert} x expert_tensor {own.expert_tensor} x pipeline {own.pipeline} = {routed}", routed),
    ):
        if gpus % ranks:
            yield f"{gpus:,} GPUs do not divide by {by}: {gpus % ranks} are left"


def uneven(parallel: ParallelSection, gpus: int, load: Load) -> Iterator[Finding]:
    """Batches that the layout cannot share out evenly."""
    data = gpus // (parallel.tensor * parallel.context * parallel.pipeline)
    exact = load.tokens / (data * load.rows * load.length)
    count = load.work(parallel, gpus).microbatches
    if load.attended is None and exact != count:
        yield Finding(
            "illegal",
            f"a batch of {load.tokens / load.length:,.0f} sequences does not divide by microbatch {load.rows} x "
            f"{data} data-parallel ranks = {load.rows * data}",
        )
    if load.attended is not None and exact < 1 - _ROUNDED:
        yield Finding(
            "unwise",
            f"an update has {load.tokens:,.0f} tokens, {load.tokens / data:,.0f} for each of {data} data-parallel "
            f"ranks, which is less than one row of {load.length:,}",
        )
    if parallel.virtual_pipeline > 1 and count % parallel.pipeline:
        yield Finding(
            "illegal" if load.attended is None else "unwise",
            f"the interleaved schedule runs microbatches in groups of pipeline = {parallel.pipeline}, but a rank has "
            f"{count} of them",
        )


def unwise(shape: Shape, parallel: ParallelSection, gpus: int, microbatches: int, per_node: int) -> Iterator[Finding]:
    """What works, but wastes."""
    own = parallel
    if own.tensor > per_node:
        yield Finding(
            "unwise", f"tensor = {own.tensor} spans {own.tensor / per_node:g} nodes: each layer waits for the network"
        )
    if own.pipeline > 1:
        bubble = (own.pipeline - 1) / (microbatches * own.virtual_pipeline + own.pipeline - 1)
        if bubble > 0.1:
            yield Finding(
                "unwise",
                f"bubble (p - 1) / (m v + p - 1) = {own.pipeline - 1} / ({microbatches} x {own.virtual_pipeline} + "
                f"{own.pipeline - 1}) = {bubble:.0%}: more microbatches or virtual_pipeline, or less pipeline",
            )
    dense = gpus // (own.tensor * own.context * own.pipeline)
    if dense < own.expert and (own.expert * own.expert_tensor) % (own.tensor * own.context):
        yield Finding(
            "unwise",
            f"expert {own.expert} x expert_tensor {own.expert_tensor} is no multiple of tensor {own.tensor} x context "
            f"{own.context}: groups of both cross each other",
        )
    experts = shape.config.num_moe_experts or 0
    if experts and own.expert == 1 and experts > 8:
        yield Finding("unwise", f"each rank holds all {experts} experts of its layers: expert = 8 keeps an eighth")


def balanced(shape: Shape, parts: int) -> str:
    """A `pipeline_layout` of so many parts that cost about the same.

    A head costs about as much as one and a half sparse layers of DeepSeek-V3, an MTP layer as itself and a head.
    """
    layers, mtp = shape.config.num_layers, shape.config.mtp_num_layers or 0
    if parts == 1:
        return "E" + "t" * layers + "m" * mtp + "L"
    head = 1.5 if shape.config.num_moe_experts else shape.outputs / (12 * shape.config.hidden_size)
    last = min(layers, max(0, round((layers + head + mtp * (1 + head)) / parts - head - mtp * (1 + head))))
    each, more = divmod(layers - last, parts - 1)
    counts = [each + (number >= parts - 1 - more) for number in range(parts - 1)]
    return "|".join(["E" + "t" * counts[0], *("t" * count for count in counts[1:]), "t" * last + "m" * mtp + "L"])
