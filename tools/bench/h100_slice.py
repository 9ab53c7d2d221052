"""The model that `h100.py` measures: a slice of DeepSeek-V3 whose layers have their true sizes.

Hidden size, heads, latents, dense MLP, experts and their choice in groups are the released model's; a dense layer and
two of experts stand for 61, as many experts as fit for 256, and the vocabulary is a sixteenth.
"""

import json
from pathlib import Path
from typing import Any

import torch

from megatron_r1.config.sections import ModelSection, ParallelSection
from megatron_r1.model.hf_folder import read_config
from megatron_r1.model.memory import Shape, Work, predict

EXAMPLES = Path(__file__).parents[2] / "examples"
V3 = EXAMPLES / "deepseek_v3/model"
TINY = EXAMPLES / "r1_tiny/model"
CUT = {"num_hidden_layers": 3, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0, "vocab_size": 8192}
EXPERTS = (64, 48, 32, 24, 16)
"""What is tried; at least two for each of the 8 groups."""
SERVED_EXPERTS = 16
USED = 0.8
"""Share of the free memory that the prediction may fill: temporaries and fragmentation come on top."""
LENGTH, ROWS = 4096, 4
"""Tokens of a row, and rows of a step, each a microbatch."""
TINY_LENGTH, TINY_ROWS = 64, 2


def write(folder: Path, tiny: bool, experts: int | None = None) -> Path:
    """The slice's `config.json`.

    Args:
        folder: is made.
        tiny: the miniature of `examples/r1_tiny` instead, without its MTP layer.
        experts: of a layer; None = as many as can be trained in the free memory.

    Raises:
        SystemExit: not even the smallest fits.
    """
    hf = read_config(TINY) | {"num_nextn_predict_layers": 0} if tiny else read_config(V3) | CUT
    if not tiny:
        hf["n_routed_experts"] = experts or most_experts(hf, torch.cuda.mem_get_info()[0])
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf))
    return folder


def most_experts(hf: dict[str, Any], free: int) -> int:
    """How many experts a layer can have.

    Raises:
        SystemExit: not even the fewest fit.
    """
    work = Work(processes=1, microbatch=1, sequence_length=LENGTH)
    for experts in EXPERTS:
        shape = Shape.of(hf | {"n_routed_experts": experts}, section(Path()))
        if predict(shape, ParallelSection(), work).total <= USED * free:
            return experts
    raise SystemExit(f"{free / 2**30:.0f} GiB of free memory do not hold a slice with {EXPERTS[-1]} experts")


def section(path: Path, **changes: Any) -> ModelSection:
    """[model] at random in bfloat16."""
    return ModelSection(path=path, load_weights=False, **changes)
