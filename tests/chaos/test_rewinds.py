"""A run that meets a spike goes back behind it and jumps over its rows, once; killed later, it goes on the same way."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.load import validate
from megatron_r1.config.runs import PretrainConfig
from megatron_r1.errors import DataError, NumericsError
from megatron_r1.train.pretrain import run
from megatron_r1.train.rewinds import Rewinds
from tests.end_to_end import runs
from tests.end_to_end.runs import rows, weights

SPIKE = 3
"""The step whose gradient norm, 14.6, is 22 deviations above those before it, 2.6 to 4.0; no other one is 15 above."""
ROWS = 4
"""Of a step."""

pytestmark = pytest.mark.timeout(1800)


def config(prepared: Path, output: Path, **guard: Any) -> PretrainConfig:
    """A checkpoint after each step, and a window that is soon half full."""
    tree = runs.pretrain(prepared, output)
    tree |= {"checkpoint": {"every": 1, "keep": 20, "asynchronous": True}}
    tree |= {"guard": {"spike": "rewind", "spike_sigma": 15.0, "window": 4, "rewind_steps": 2} | guard}
    return validate(PretrainConfig, tree, where="test")


@pytest.fixture(scope="module")
def rewound(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has gone back."""
    output = tmp_path_factory.mktemp("rewound") / "run"
    run(config(prepared, output))
    return output


def test_it_goes_back_and_jumps_over_what_was_read_since(rewound: Path, prepared: Path) -> None:
    [made] = json.loads((rewound / "skipped_rows.json").read_text())
    back = SPIKE - 2
    assert made == {"step": SPIKE, "checkpoint": back, "first": ROWS * back, "last": ROWS * (SPIKE + 1) - 1}
    assert (rewound / f"bad_batches/step_{SPIKE:08d}/rank_0.pt").exists()
    said = (rewound / "run.log").read_text()
    assert f"step {SPIKE}: the gradient norm 14." in said
    assert "so the update was rewound" in said
    found, plain = rows(rewound), rows(prepared / "base")
    assert [row["step"] for row in found] == list(range(12))
    assert found[:back] == plain[:back]
    assert found[back]["loss"] != plain[back]["loss"], "it has read the same rows again"


@pytest.mark.parametrize("killed_after", [SPIKE - 2, 8])
def test_killed_later_it_goes_on_the_same_way(rewound: Path, prepared: Path, tmp_path: Path, killed_after: int) -> None:
    """At once after it had gone back, too: the list of rows is whole before the next checkpoint is."""
    output = shutil.copytree(rewound, tmp_path / "run")
    for path in (output / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > killed_after:
            shutil.rmtree(path)
    shutil.rmtree(output / "hf")
    run(config(prepared, output))
    assert weights(output) == weights(rewound)
    assert rows(output) == rows(rewound)
    assert (output / "skipped_rows.json").read_text() == (rewound / "skipped_rows.json").read_text()
    assert "trained on other rows" not in (output / "run.log").read_text()


def damaging(monkeypatch: pytest.MonkeyPatch, output: Path, *steps: int) -> None:
    """Have a disk lose a byte of these checkpoints before the run looks for one to go back to."""
    target = Rewinds.target

    def and_damage(*arguments: Any) -> int:
        for done in steps:
            path = output / f"checkpoints/step_{done:08d}/__0_0.distcp"
            content = bytearray(path.read_bytes())
            content[len(content) // 2] = 0xFF - content[len(content) // 2]
            path.write_bytes(content)
        monkeypatch.undo()
        return target(*arguments)

    monkeypatch.setattr(Rewinds, "target", and_damage)


def test_it_goes_further_back_where_a_checkpoint_is_damaged(
    rewound: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the one that the other run has gone back to, so the two end alike."""
    output = tmp_path / "run"
    damaging(monkeypatch, output, SPIKE - 1)
    run(config(prepared, output, rewind_steps=1))
    said = (output / "run.log").read_text()
    assert f"warning: going back to step {SPIKE - 2}: {output}/checkpoints/step_{SPIKE - 1:08d} is damaged" in said
    assert "__0_0.distcp has been altered" in said
    assert weights(output) == weights(rewound)
    assert (output / "skipped_rows.json").read_text() == (rewound / "skipped_rows.json").read_text()


def test_no_checkpoint_is_dropped_where_all_are_damaged(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    before = range(1, SPIKE + 1)
    damaging(monkeypatch, output, *before)
    with pytest.raises(
        DataError, match=f"a bad update at step {SPIKE}, and no checkpoint before it is whole"
    ) as caught:
        run(config(prepared, output))
    names = [f"step_{done:08d}" for done in before]
    assert all(f"{name} is damaged (__0_0.distcp has been altered" in str(caught.value) for name in names)
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == names
    assert not (output / "skipped_rows.json").exists()


def test_it_stops_where_it_may_not_go_back(prepared: Path, tmp_path: Path) -> None:
    """What was saved before is whole, though it was being written when the run was stopped."""
    with pytest.raises(NumericsError, match=f"step {SPIKE}: the gradient norm 14.*so the update was refused"):
        run(config(prepared, tmp_path / "run", spike="stop"))
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == [f"step_{done:08d}" for done in range(1, SPIKE + 1)]


def test_other_rows_than_before_are_told(prepared: Path, tmp_path: Path) -> None:
    """A run that is prolonged within an epoch goes on with the rows that follow."""
    output = shutil.copytree(prepared / "base", tmp_path / "run")
    longer = validate(PretrainConfig, runs.pretrain(prepared, output) | {"steps": 13}, where="test")
    run(longer)
    assert "trained on other rows" not in (output / "run.log").read_text()
    corpus = longer.corpus.model_copy(update={"train": longer.corpus.validation})
    run(longer.model_copy(update={"steps": 14, "corpus": corpus}))
    assert "warning: the 13 steps before were trained on other rows" in (output / "run.log").read_text()
