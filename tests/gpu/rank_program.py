"""One rank of `test_two_ranks.py`: python -m tests.gpu.rank_program FOLDER MODEL PARALLEL, the last as JSON."""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file

from megatron_r1.config.load import validate
from megatron_r1.config.sections import ParallelSection
from megatron_r1.model.parallel import initialize
from tests.distributed import kinds


def main() -> None:
    folder, model, parallel = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    initialize(validate(ParallelSection, parallel, where="job"), seed=0)
    seen: kinds.Seen = {}
    tensors = kinds.sft({"model": model}, seen)
    if dist.get_rank() == 0:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / "end.safetensors")
        (folder / "seen.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
