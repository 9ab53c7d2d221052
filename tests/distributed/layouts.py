"""The parallel layouts, what is run under each, and how far from one process it may end.

`python -m tests.distributed.layouts --table` measures all of them, for docs/parallel.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
BOUND = 1e-5
"""Largest relative difference from one process in float32. A sum of n numbers in another order differs by about
sqrt(n) x 2^-24 = 6e-8 sqrt(n); losses are sums of some 10^3 terms, gradients pass through a few such sums."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"processes": 2},
    "dp4": {"processes": 4},
    "tp2": {"tensor": 2},
    "tp4": {"tensor": 4},
    "tp2_dp2": {"processes": 4, "tensor": 2},
    "tp2_etp2": {"tensor": 2, "expert_tensor": 2},
    "tp2_ep2": {"tensor": 2, "expert": 2},
    "tp2_ep2_etp2": {"processes": 4, "tensor": 2, "expert": 2, "expert_tensor": 2},
    "pp2": {"pipeline": 2},
    "pp4": {"pipeline": 4},
    "pp2_dp2": {"processes": 4, "pipeline": 2},
    "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "pp2_layout": {"pipeline": 2, "pipeline_layout": "Et*3|tmL"},
    "pp2_vpp2_layout": {"pipeline": 2, "virtual_pipeline": 2, "pipeline_layout": "E|t*2|t|tmL"},
    "ep2": {"processes": 2, "expert": 2},
    "ep4": {"processes": 4, "expert": 4},
    "ep2_dp2": {"processes": 4, "expert": 2},
    "cp2": {"context": 2},
    "cp4": {"context": 4},
    "cp2_dp2": {"processes": 4, "context": 2},
    "cp2_ep2": {"context": 2, "expert": 2},
    "tp2_cp2": {"tensor": 2, "context": 2},
    "tp2_pp2": {"tensor": 2, "pipeline": 2},
    "tp2_pp2_vpp2": {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2},
    "pp2_ep2": {"processes": 4, "pipeline": 2, "expert": 2},
    "pp2_vpp2_ep2": {"processes": 4, "pipeline": 2, "virtual_pipeline": 2, "expert": 2},
    "pp2_cp2": {"pipeline": 2, "context": 2},
}
"""Name -> [parallel] of a run file."""
PARTS = ("pretrain", "sft", "rl")
COLUMNS = ("loss", "grad_norm", "figures", "parameters", "router_bias", "logprobs", "entropies")
ROUTER_BIAS = "e_score_correction_bias"


@dataclass
class Seen:
    """What the first rank wrote of one part."""

    seen: dict[str, Any]
    weights: dict[str, torch.Tensor]

    @classmethod
    def read(cls, folder: Path) -> Self:
        return cls(json.loads((folder / "seen.json").read_text()), load_file(folder / "end.safetensors"))


class Launcher:
    """`tests.distributed.program`, kept warm; a context manager.

    Args:
        folder: where its model folders and the results of its jobs go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "tests.distributed.program", str(self.folder / "models")]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self._answer() is None, "the model folders could not be written"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        try:
            self._process.wait(20)
        finally:
            self._process.kill()

    def run(self, name: str, parallel: dict[str, Any], parts: Sequence[dict[str, Any]]) -> dict[str, Seen]:
        """What was seen of each part, by its name.

        Args:
            name: of the folder.
            parallel: the run file's [parallel].
            parts: see `tests/distributed/program.py`; `model` is a name of `tests/distributed/models.py`.
        """
        folder = self.folder / name
        folder.mkdir()
        named = [part | {"model": str(self.folder / "models" / part.get("model", "v3"))} for part in parts]
        job = {"folder": str(folder), "parallel": parallel, "parts": named}
        self._process.stdin.write(json.dumps(job) + "\n")  # type: ignore[union-attr]
        error = self._answer()
        assert error is None, f"{name}: {error}"
        return {part["name"]: Seen.read(folder / part["name"]) for part in parts}

    def _answer(self) -> Any:
        line = self._process.stdout.readline()  # type: ignore[union-attr]
        assert line, f"the program ended with {self._process.wait(20)}"
        return json.loads(line)


def parts(*names: str, **changes: Any) -> list[dict[str, Any]]:
    """Parts named as their kinds, with the same changes."""
    return [{"name": name, "kind": name, **changes} for name in names]


def differences(found: Seen, expected: Seen) -> dict[str, float]:
    """Largest relative differences, by column.

    Figures are compared with their own size, but those that are sums of both signs, as the losses and log-ratios of
    reinforcement learning are, with 1 where they are smaller; tensors and lists with their largest element. A score of
    a scalar head is a single number of either sign, so it is compared with the largest score of its batch.
    """
    result: dict[str, float] = {}

    def note(column: str, value: float) -> None:
        result[column] = max(result.get(column, 0.0), value)

    ours, theirs = found.seen["figures"], expected.seen["figures"]
    assert [set(step) for step in ours] == [set(step) for step in theirs]
    for name, value, other in ((name, a[name], b[name]) for a, b in zip(ours, theirs, strict=True) for name in b):
        size = abs(other) if "grad_norm" in name or name == "lr" else max(abs(other), 1.0)
        column = "loss" if "loss" in name else "grad_norm" if "grad_norm" in name else "figures"
        note(column, abs(value - other) / size if size else abs(value))
    assert found.weights.keys() == expected.weights.keys()
    for name, tensor in expected.weights.items():
        note("router_bias" if name.endswith(ROUTER_BIAS) else "parameters", relative(found.weights[name], tensor))
    for name in {"logprobs", "entropies"} & expected.seen.keys():
        for a, b in zip(_flat(found.seen[name]), _flat(expected.seen[name]), strict=True):
            note(name, relative(torch.tensor(a), torch.tensor(b)))
    for ours, theirs in zip(found.seen.get("values", []), expected.seen.get("values", []), strict=True):
        note("values", relative(*(torch.tensor([*chain(*_flat(batch))]) for batch in (ours, theirs))))
    return result


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """max |a - b| / max |b|"""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def _flat(tree: Any) -> Iterator[list[float]]:
    """The innermost lists."""
    if tree and isinstance(tree[0], list):
        for part in tree:
            yield from _flat(part)
    else:
        yield tree


def worst(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of several parts."""
    return {column: max((row[column] for row in rows if column in row), default=0.0) for column in COLUMNS}


def table(measured: dict[str, dict[str, float]]) -> str:
    """Markdown; layout -> largest relative differences."""
    titles = [column.replace("_", " ") for column in COLUMNS]
    lines = ["| layout | " + " | ".join(titles) + " |", "|---" * (1 + len(titles)) + "|"]
    for name, row in measured.items():
        numbers = ["0" if row[column] == 0 else f"{row[column]:.1e}" for column in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure every layout."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--table", action="store_true", required=True)
    parser.add_argument("layouts", nargs="*", default=list(LAYOUTS))
    names = parser.parse_args().layouts
    with tempfile.TemporaryDirectory() as folder, Launcher(Path(folder)) as launcher:
        alone, measured = launcher.run("alone", {}, parts(*PARTS)), {}
        for name in names:
            found = launcher.run(name, LAYOUTS[name], parts(*PARTS))
            measured[name] = worst([differences(found[part], alone[part]) for part in PARTS])
    print(table(measured))


if __name__ == "__main__":
    main()
