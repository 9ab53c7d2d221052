"""What single ranks of layouts hold, measured in one process: torch's fake process group stands for the others.

``python -m tests.model.layout_program MODEL_FOLDER CASES`` takes a JSON list of ``[[parallel], processes, rank]`` and
prints as many ``[bytes of parameters, bytes saved by a forward pass]``. The second is null in a pipeline, and where
what other ranks send decides a shape.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_r1.config.sections import ModelSection, ParallelSection
from megatron_r1.model.activations import saved_bytes
from megatron_r1.model.build import build_model
from megatron_r1.model.parallel import initialize

ROWS, LENGTH = 2, 60


def saved(module: torch.nn.Module) -> int:
    """Bytes that a forward pass keeps for the backward pass."""
    tokens = torch.randint(100, (ROWS, LENGTH))
    return saved_bytes(module, lambda: module.train()(tokens, torch.arange(LENGTH)[None], None, labels=tokens).sum())


def measured(folder: Path, parallel: ParallelSection, processes: int, rank: int) -> tuple[int, int | None]:
    from megatron.core import parallel_state  # megatron_r1.model must have prepared Megatron for the CPU before

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=processes)
    initialize(parallel, seed=0)
    built = build_model(ModelSection(path=folder, load_weights=False, dtype="float32", balance_loss_coef=0.0), 128)
    params = sum(param.nbytes for chunk in built.chunks for param in chunk.parameters())
    whole = parallel.pipeline == parallel.expert == 1 and not (built.config.num_moe_experts and parallel.tensor > 1)
    kept = saved(built.module) if whole else None
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return params, kept


def main() -> None:
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    print(json.dumps([measured(folder, ParallelSection(**parallel), *where) for parallel, *where in cases]))


if __name__ == "__main__":
    main()
