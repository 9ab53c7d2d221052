"""Megatron's vocabulary-parallel cross-entropy in two processes, each with half of the vocabulary.

Run as a module it answers requests on standard input, one JSON line each, until it ends: logits and labels in, losses
and the gradient of their mean out.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[2]


class TwoRanks:
    """The two processes; a context manager."""

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "tests.loss.vocab_parallel"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)

    def cross_entropy(self, logits: list[list[float]], labels: list[int]) -> tuple[list[float], list[list[float]]]:
        """Cross-entropy of each row, and the gradient of their mean with respect to the logits."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([logits, labels]) + "\n")
        losses, gradient = json.loads(self.process.stdout.readline())
        return losses, gradient


def _serve(rank: int, inbox: Any, outbox: Any, port_file: str) -> None:
    import torch
    import torch.distributed as dist

    from megatron_r1.compat import megatron_cpu

    megatron_cpu.enable()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=2)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2, create_gloo_process_groups=False)
    while (request := inbox.get()) is not None:
        logits, labels = request
        half = len(logits[0]) // 2
        mine = torch.tensor(logits)[:, rank * half : (rank + 1) * half].clone().requires_grad_()
        # Megatron takes [seq, batch, vocab] and overwrites what it is given.
        losses = vocab_parallel_cross_entropy((mine * 1.0)[:, None], torch.tensor(labels)[:, None])[:, 0]
        losses.mean().backward()
        outbox.put((losses.tolist(), mine.grad.tolist()))
    dist.destroy_process_group()


def _main() -> None:
    import tempfile

    import torch.multiprocessing as mp

    context = mp.get_context("spawn")
    inboxes, outboxes = [[context.Queue() for _ in range(2)] for _ in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_serve, args=(rank, inboxes[rank], outboxes[rank], f"{folder}/store"), daemon=True)
            for rank in range(2)
        ]
        for process in ranks:
            process.start()
        for line in sys.stdin:
            for inbox in inboxes:
                inbox.put(json.loads(line))
            (losses, left), (same, right) = [outbox.get(timeout=120) for outbox in outboxes]
            assert losses == same
            print(json.dumps([losses, [a + b for a, b in zip(left, right, strict=True)]]), flush=True)
        for inbox in inboxes:
            inbox.put(None)
        for process in ranks:
            process.join(20)


if __name__ == "__main__":
    _main()
