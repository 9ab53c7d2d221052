"""A recipe as a chain of jobs: a bad node is left out, a stage is requeued in the middle, the chain goes on."""

from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end import runs
from tests.slurm.cluster import Slurm
from tests.slurm.jobs import submit

pytestmark = pytest.mark.timeout(1800)


def recipe(folder: Path, prepared: Path) -> dict[str, Any]:
    """An index of a corpus that is there, and pretraining on two nodes."""
    index = runs.index(prepared)
    base = runs.pretrain(prepared, folder / "base") | {"parallel": {"nodes": 2, "processes": 1}}
    base["corpus"] |= {"train": ["@index/train"], "validation": ["@index/validation"]}
    del index["output"], base["output"]
    return {
        "output": str(folder / "recipe"),
        "stages": {"index": {"verb": "data index"} | index, "base": {"verb": "pretrain"} | base},
    }


def test_chain(slurm: Slurm, prepared: Path, tmp_path: Path) -> None:
    file = runs.write(tmp_path / "recipe.toml", recipe(tmp_path, prepared))
    refuses = '[[ $SLURM_JOB_NAME != base || $SLURMD_NODENAME != n1 ]] || { echo "the fan is loud"; false; }'
    jobs = submit(slurm, tmp_path, file.name, HEALTH_COMMAND=refuses)
    assert len(jobs) == 2
    base, output = jobs[-1], tmp_path / "recipe/base"
    base.until(runs.checkpoint(output, 4))
    slurm.call("scontrol", "requeue", base.number)
    for job in jobs:
        job.end()
    assert "n1" not in base.nodes()
    assert "bad node n1: '" in base.said()
    assert "the fan is loud" in (tmp_path / "recipe/logs/slurm/bad_nodes").read_text()
    assert (tmp_path / "recipe/summary.json").exists()

    undisturbed = tmp_path / "undisturbed"
    tree = runs.pretrain(prepared, undisturbed) | {"parallel": {"processes": 2}}
    with runs.Command("pretrain", runs.write(tmp_path / "pretrain.toml", tree)) as command:
        assert command.end(900) == 0, command.message()
    assert runs.weights(output) == runs.weights(undisturbed)
    assert runs.rows(output) == runs.rows(undisturbed)
