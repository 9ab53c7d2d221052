"""Layouts that cannot be, and those that waste, with their arithmetic."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.sections import ModelSection, ParallelSection
from megatron_r1.model.memory import Shape, stages
from megatron_r1.plan.layouts import balanced, illegal, uneven, unwise
from megatron_r1.plan.run_file import Load

HF = json.loads((Path(__file__).parents[2] / "examples/deepseek_v3/model/config.json").read_text())
SHAPE = Shape.of(HF, ModelSection(path=Path()))
LOAD = Load(rows=1, length=4096, tokens=1024 * 4096, updates=1, steps=1, attended=None)


def texts(gpus: int, **parallel: Any) -> str:
    own = ParallelSection(**parallel)
    return "\n".join(finding.text for finding in [*illegal(SHAPE, HF, own, gpus), *uneven(own, gpus, LOAD)])


def test_a_published_layout_is_legal() -> None:
    assert texts(1024, tensor=2, pipeline=8, virtual_pipeline=4, pipeline_layout="Et|(tt|)*30mL", expert=64) == ""


@pytest.mark.parametrize(
    ("gpus", "parallel", "text"),
    [
        (100, {"tensor": 8}, "100 GPUs do not divide by tensor 8 x context 1 x pipeline 1 = 8: 4 are left"),
        (96, {"expert": 64}, "96 GPUs do not divide by expert 64 x expert_tensor 1 x pipeline 1 = 64: 32 are left"),
        (96, {"tensor": 3}, "128 attention heads do not divide by tensor = 3: 2 are left"),
        (48, {"expert": 24}, "256 experts do not divide by expert = 24: 16 are left"),
        (16, {"pipeline": 16}, "61 layers do not divide over pipeline 16 x virtual_pipeline 1 = 16 parts: write a"),
        (16, {"pipeline": 2, "pipeline_layout": "Et*30|t*30mL"}, "has 60 layers in 2 parts, but the model has 61"),
        (16, {"pipeline": 2, "pipeline_layout": "Et*30|t*31mQ"}, "cannot read pipeline_layout"),
        (48, {}, "a batch of 1,024 sequences does not divide by microbatch 1 x 48 data-parallel ranks = 48"),
    ],
)
def test_illegal_layouts_are_named(gpus: int, parallel: dict[str, Any], text: str) -> None:
    assert text in texts(gpus, **parallel)


def test_interleaving_needs_whole_groups_of_microbatches() -> None:
    """1,024 sequences over 64 copies are 16 microbatches, over 128 copies 8, which are no groups of 16."""
    vpp = {"pipeline": 16, "virtual_pipeline": 2, "pipeline_layout": "Et|(tt|)*30mL"}
    assert texts(1024, **vpp) == ""
    assert "groups of pipeline = 16, but a rank has 8 of them" in texts(2048, **vpp)


def test_a_model_without_experts_has_no_expert_parallelism() -> None:
    hf = {"architectures": ["LlamaForCausalLM"]}
    dense = Shape.of(HF, ModelSection(path=Path()))
    dense.config.num_moe_experts = None
    found = [finding.text for finding in illegal(dense, hf, ParallelSection(expert=2), 2)]
    assert found[0] == "expert = 2, but LlamaForCausalLM has no experts"


def test_waste_is_named() -> None:
    own = ParallelSection(tensor=16, pipeline=16)
    found = "\n".join(finding.text for finding in unwise(SHAPE, own, 256, 30, 8))
    assert "tensor = 16 spans 2 nodes" in found
    assert "15 / (30 x 1 + 15) = 33%" in found
    assert "all 256 experts" in found


@pytest.mark.parametrize("parts", [1, 2, 4, 7, 8, 16, 32, 61])
def test_balanced_layouts_hold_the_model(parts: int) -> None:
    own = ParallelSection(pipeline=parts, pipeline_layout=balanced(SHAPE, parts))
    held = stages(SHAPE.config, own)
    assert sum(len(stage.layers) for stage in held) == 61
    assert held[0].embedding
    assert held[-1].head
    assert held[-1].mtp == 1
    if parts > 1:
        counts = [len(stage.layers) for stage in held[:-1]]
        assert max(counts) - min(counts) <= 1
        assert len(held[-1].layers) <= min(counts)
