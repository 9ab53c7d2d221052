import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools/results.py"


def summary(seed: int, accuracy: float, length: float | None) -> dict[str, object]:
    figures = {"heldout_accuracy": accuracy, "mean_length": length}
    stages = {"base": {"verb": "pretrain", "state": "ran", "seconds": 60.0 + 60 * seed, **figures}}
    return {"seed": seed, "models": {"base": figures}, "stages": stages, "seconds": 90.0}


def run(*folders: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *folders], capture_output=True, text=True, check=False)


def test_means_with_the_seeds_behind_them(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, values in zip(folders, [(0, 0.25, 30.0), (1, 0.5, None)], strict=True):
        folder.mkdir()
        (folder / "summary.json").write_text(json.dumps(summary(*values)))
    printed = run(*folders).stdout
    assert "Seeds 0, 1." in printed
    assert "| `base` | **37.5** (25.0, 50.0) | **30.0** (30.0, –) |" in printed
    assert "| `base` | pretrain | 1.0, 2.0 |" in printed
    assert "| `base` | 25.0 | 30.0 |" in run(folders[0]).stdout


def test_a_recipe_that_has_not_finished(tmp_path: Path) -> None:
    outcome = run(tmp_path)
    assert outcome.returncode == 2
    assert "no summary.json" in outcome.stderr
