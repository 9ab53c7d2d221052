"""`make quickstart`: every verb from nothing to a finished R1-Zero run, timed, with one summary at the end.

Runs the five verbs of `examples/r1_tiny/` as a user would type them and writes `runs/quickstart/summary.json`
and `report.html`. Killed, it goes on where it was: verbs that are done are not repeated, and what they took is
remembered. Overrides of the `rl` verb may be given, for example `--report.wandb=offline`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

EXAMPLE = Path("examples/r1_tiny")
OUTPUT = Path("runs/quickstart")
VERBS = {
    "data generate": "generate",
    "tokenizer train": "tokenizer",
    "data index": "index",
    "pretrain": "pretrain",
    "rl": "r1_zero",
}
DONE = {"data generate": "corpus", "tokenizer train": "tokenizer", "data index": "index", "pretrain": "base"}
"""Verb -> folder below `OUTPUT` whose summary.json says that it has finished."""
GIB = 2**30


def main() -> int:
    """Run what is not done yet. Returns the exit code of the first verb that fails."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    times = OUTPUT / "seconds.json"
    record: dict[str, Any] = json.loads(times.read_text()) if times.exists() else {"seconds": {}, "peak": 0}
    seconds: dict[str, float] = record["seconds"]
    with PeakMemory(record["peak"]) as memory:
        for verb, name in VERBS.items():
            if verb in DONE and (OUTPUT / DONE[verb] / "summary.json").exists():
                print(f"== {verb}: done before ==", flush=True)
                continue
            print(f"\n== megatron-r1 {verb} {EXAMPLE / name}.toml ==", flush=True)
            start = time.monotonic()
            code = run(verb, EXAMPLE / f"{name}.toml", sys.argv[1:] if verb == "rl" else [])
            seconds[verb] = round(seconds.get(verb, 0.0) + time.monotonic() - start, 1)
            OUTPUT.mkdir(parents=True, exist_ok=True)
            times.write_text(json.dumps({"seconds": seconds, "peak": memory.peak}))
            if code:
                return code
    install = Path(sys.prefix) / "install_seconds"
    installed = float(install.read_text()) if install.exists() else 0.0
    total = round(installed + sum(seconds.values()), 1)
    figures = json.loads((OUTPUT / "r1_zero/summary.json").read_text())
    figures |= {
        "seconds_install": installed,
        "seconds": seconds,
        "seconds_total": total,
        "peak_memory_gib": round(memory.peak / GIB, 2),
    }
    aside = OUTPUT / "summary.json.partial"
    aside.write_text(json.dumps(figures, indent=2) + "\n")
    aside.replace(OUTPUT / "summary.json")
    shutil.copy2(OUTPUT / "r1_zero/report.html", OUTPUT / "report.html")
    gain = 100 * (figures["heldout_accuracy_final"] - figures["heldout_accuracy_base"])
    print(
        f"\nHeld-out accuracy {figures['heldout_accuracy_base']:.1%} -> {figures['heldout_accuracy_final']:.1%} "
        f"({gain:+.1f} points), format {figures['format_rate_final']:.1%}, {total / 60:.1f} minutes with the install, "
        f"peak memory {figures['peak_memory_gib']} GiB.\nFigures: {OUTPUT}/summary.json\nReport:  {OUTPUT}/report.html"
    )
    return 0


def run(verb: str, config: Path, overrides: list[str]) -> int:
    """One verb as a process of its own; it is stopped with this one."""
    command = [sys.executable, "-m", "megatron_r1.cli", *verb.split(), str(config), *overrides]
    # One OpenMP thread a process: two on busy cores cost many times what they gain.
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise


class PeakMemory:
    """Samples the memory of all child processes; pages that they share are counted once (PSS)."""

    def __init__(self, peak: int) -> None:
        self.peak = peak
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(2.0):
            total = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:  # it ended between the listing and the look
                    continue
            self.peak = max(self.peak, total)


if __name__ == "__main__":
    sys.exit(main())
