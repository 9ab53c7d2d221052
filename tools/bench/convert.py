"""Converting a checkpoint against `cp` of the same bytes, and against loading and saving it with transformers.

    python tools/bench/convert.py [--config=config.json] [--folder=/disk] [--rounds=3]

The checkpoint is made on the spot, with pseudo-random weights: a Llama of about 2.5 GB, or whatever `--config`
describes. Every contender starts with source files that are not in the page cache and ends when its files are on the
disk (fsync). Before each turn the disk finishes what others have given it (sync). Conversions and transformers run in a
process of their own; imports do not count, all else does, the plan and the checks included. `cp` always copies the
bfloat16 files: what import and export read and write, and the larger side of a cast. Speed is the bytes of these files
over the time. Processor time is that of user and system together; other work on the machine changes it less.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paired import Comparison, measure, report

MAKER = Path(__file__).parents[1] / "header_checkpoint.py"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 64000,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
OURS = """
import json, sys, time
from megatron_r1.config import convert as config
from megatron_r1.convert import verbs

kind, run = {
    "import": (config.ImportConfig, verbs.run_import),
    "export": (config.ExportConfig, verbs.run_export),
    "cast": (config.CastConfig, verbs.run_cast),
}[sys.argv[1]]
begin, used = time.perf_counter(), time.process_time()
run(kind(**json.loads(sys.argv[2])))
seconds, used = time.perf_counter() - begin, time.process_time() - used
print(json.dumps({"seconds": seconds, "processor": used, "memory": verbs.peak_memory()}))
"""
TRANSFORMERS = """
import json, os, sys, time
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from megatron_r1.convert.verbs import peak_memory

begin, used = time.perf_counter(), time.process_time()
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).save_pretrained(sys.argv[2])
for path in Path(sys.argv[2]).iterdir():
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
seconds, used = time.perf_counter() - begin, time.process_time() - used
print(json.dumps({"seconds": seconds, "processor": used, "memory": peak_memory()}))
"""


class Bench:
    """Source folders, and contenders that read them.

    Args:
        folder: on the disk that is measured; emptied after every run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.last: dict[str, dict[str, float]] = {}
        """Figures of each contender's last run: seconds, processor (seconds), memory (GB)."""

    def child(self, name: str, source: Path, code: str, *arguments: str) -> float:
        """Seconds of a program in a process of its own; the other figures are kept under `name`."""
        self.settle(source)
        done = subprocess.run([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, check=True)
        figures = json.loads(done.stdout.splitlines()[-1])
        self.last[name] = figures | {"memory": figures["memory"] / 1e9}
        shutil.rmtree(self.folder / "out")
        return float(figures["seconds"])

    def ours(self, name: str, verb: str, source: Path, **options: Any) -> Callable[[], float]:
        """A conversion."""
        text = json.dumps({"source": str(source), "output": str(self.folder / "out"), **options})
        return lambda: self.child(name, source, OURS, verb, text)

    def transformers(self, source: Path) -> Callable[[], float]:
        """Load and save."""
        return lambda: self.child("transformers", source, TRANSFORMERS, str(source), str(self.folder / "out"))

    def copy(self, source: Path) -> Callable[[], float]:
        """`cp` and fsync."""

        def figure() -> float:
            self.settle(source)
            begin, used = time.perf_counter(), processor_seconds()
            subprocess.run(["cp", "-r", source, self.folder / "out"], check=True)
            sync(self.folder / "out")
            seconds = time.perf_counter() - begin
            self.last["cp"] = {"seconds": seconds, "processor": processor_seconds() - used}
            shutil.rmtree(self.folder / "out")
            return seconds

        return figure

    def make(self, verb: str, source: Path, name: str, **options: Any) -> Path:
        """The result of a conversion, kept as the source of another."""
        text = json.dumps({"source": str(source), "output": str(self.folder / name), **options})
        subprocess.run([sys.executable, "-c", OURS, verb, text], stdout=subprocess.DEVNULL, check=True)
        return self.folder / name

    def figure(self, name: str, what: str) -> Callable[[], float]:
        """Of the contender's last run."""
        return lambda: self.last[name][what]

    def settle(self, source: Path) -> None:
        """Have the disk finish what it was given, and drop a folder's files from the page cache."""
        os.sync()
        for path in (path for path in source.rglob("*") if path.is_file()):
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def processor_seconds() -> float:
    """Of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def sync(folder: Path) -> None:
    for path in (path for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def comparisons(bench: Bench, plain: Path, nbytes: int, workers: int) -> list[Comparison]:
    """Every conversion against `cp`, and import against transformers in time and memory."""
    megatron = bench.make("import", plain, "megatron")
    blocks = bench.make("cast", plain, "fp8", dtype="fp8")
    options = {"workers": workers}
    imported = bench.ours("import", "import", plain, **options)
    cast = bench.ours("cast", "cast", blocks, dtype="bfloat16", **options)
    quantised = bench.ours("quantise", "cast", plain, dtype="fp8", **options)
    rows = [
        ("import, bfloat16", "import", imported),
        ("export, bfloat16", "export", bench.ours("export", "export", megatron, **options)),
        ("cast, FP8 to bfloat16", "cast", cast),
        ("cast, bfloat16 to FP8", "quantise", quantised),
    ]

    def speed(seconds: Callable[[], float]) -> Callable[[], float]:
        return lambda: nbytes / 1e6 / seconds()

    made: list[Comparison] = []
    for title, name, ours in rows:
        used = bench.figure(name, "processor"), bench.figure("cp", "processor")
        made.append(Comparison(title, "MB/s", "cp and fsync", speed(ours), speed(bench.copy(plain)), 0.7))
        made.append(Comparison("its processor time", "s", "cp and fsync", *used))
    loaded = bench.transformers(plain)
    peaks = bench.figure("import", "memory"), bench.figure("transformers", "memory")
    return [
        *made,
        Comparison("import, bfloat16", "MB/s", "transformers, load and save", speed(imported), speed(loaded)),
        Comparison("its peak memory", "GB", "transformers, load and save", *peaks),
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="config.json of the model (default: a Llama of 1.2B parameters)")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk that is measured (default: here)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3, help="pairs that are measured (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        bench, config = Bench(Path(name)), Path(name, "config.json")
        config.write_text(chosen.config.read_text() if chosen.config else json.dumps(LLAMA))
        subprocess.run([sys.executable, MAKER, config, bench.folder / "hf", "--fill"], check=True)
        size = sum(path.stat().st_size for path in (bench.folder / "hf").iterdir())
        made = comparisons(bench, bench.folder / "hf", size, chosen.workers)
        measure(made, chosen.rounds)
        settings = {"bytes": size, "workers": chosen.workers, "folder": str(chosen.folder.resolve())}
    report("convert", made, chosen.json, **settings)


if __name__ == "__main__":
    main()
