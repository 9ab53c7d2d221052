"""Ours and the baseline of `tools/bench/h100.py`, side by side on a CPU: python -m tests.tools.published_program FP8

Prints as JSON what each is made of. Transformer Engine is `engine_stand_in`, and the machine is said to be a Hopper.
"""

import dataclasses
import json
import sys
import tempfile
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.model import engine_stand_in

engine_stand_in.install()
# What a model is made with, though nothing is computed here.
vars(sys.modules["transformer_engine.pytorch"])["fp8_model_init"] = lambda **_: nullcontext()
PERMUTATION = ModuleType("transformer_engine.pytorch.permutation")
for kind in ("permute", "permute_with_probs", "sort_chunks_by_index", "sort_chunks_by_index_with_probs", "unpermute"):
    setattr(PERMUTATION, f"moe_{kind}", print)
sys.modules[PERMUTATION.__name__] = PERMUTATION
sys.path.insert(0, str(Path(__file__).parents[2] / "tools/bench"))

import h100_slice  # noqa: E402
from h100_learners import FP8, published  # noqa: E402

from megatron_r1.config.sections import ParallelSection  # noqa: E402
from megatron_r1.model import build, family, kernels  # noqa: E402
from megatron_r1.model.parallel import initialize  # noqa: E402

HOPPER = dataclasses.replace(kernels.Machine.here(), cuda=(13, 0), capability=(9, 0))
LENGTH = 64


class _Hopper:
    """In the place of the class that asks torch."""

    @staticmethod
    def here() -> kernels.Machine:
        return HOPPER


def described(module: Any) -> dict[str, Any]:
    """Megatron's config, kinds of modules, and parameters of a model."""
    fields = [field.name for field in dataclasses.fields(module.config)]
    return {
        "config": {name: repr(getattr(module.config, name)) for name in fields},
        "modules": Counter(type(part).__name__ for part in module.modules()),
        "parameters": {name: [*one.shape, str(one.dtype)] for name, one in module.named_parameters()},
    }


def main() -> None:
    build.Machine = family.Machine = _Hopper  # type: ignore[misc]
    initialize(ParallelSection(), seed=0)
    with tempfile.TemporaryDirectory() as name:
        folder = h100_slice.write(Path(name) / "slice", tiny=True)
        ours = build.build_model(h100_slice.section(folder, **({"fp8": FP8} if sys.argv[1] == "fp8" else {})), LENGTH)
    found = {"ours": described(ours.module), "published": described(published(ours, LENGTH))}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
