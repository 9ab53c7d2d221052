"""A run that goes on under one layout after another: each loads what was saved, and the end is that of one process."""

import shutil
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import megatron_r1.model  # noqa: F401  the index of a checkpoint names Megatron's classes
from tests.distributed.layouts import BOUND, LAYOUTS, Launcher, Seen, differences

CHAIN = ["tp2_pp2", "one", "ep2", "cp2", "pp2_vpp2"]
EACH = 2
"""Steps under each layout."""
OPTIM = {"schedule": "constant", "lr": 3e-3}
"""With the 1e-2 of the other tests this model leaves the stable range after its seventh step: a change of the last bit
of its weights grows tenfold a step, in one process as in any layout, until gradient norms are 1e-4 to 1e-3 away."""

pytestmark = pytest.mark.timeout(900)


def stage(number: int, folder: Path) -> dict[str, Any]:
    """What the layout of that number does."""
    return {
        "name": "resume",
        "kind": "resume",
        "optim": OPTIM,
        "first": number * EACH,
        "end": (number + 1) * EACH,
        "from": str(folder / f"to_{number - 1}"),
        "again": str(folder / f"again_{number}"),
        "to": str(folder / f"to_{number}"),
    }


@pytest.fixture(scope="module")
def chain(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Seen]]:
    """The checkpoints' folder, and what each layout has seen."""
    folder = tmp_path_factory.mktemp("chain")
    found = []
    for number, name in enumerate(CHAIN):
        layout = LAYOUTS.get(name, {})
        found.append(launcher.run(f"chain_{number}_{name}", layout, [stage(number, folder)])["resume"])
    return folder, found


def test_weights_arrive_byte_for_byte(chain: tuple[Path, list[Seen]]) -> None:
    for before, after in zip(chain[1], chain[1][1:], strict=False):
        assert after.seen["start"] == before.seen["end"]


@pytest.mark.parametrize("number", range(1, len(CHAIN)))
def test_what_is_loaded_and_saved_again_is_the_same(chain: tuple[Path, list[Seen]], number: int) -> None:
    """Every tensor of the checkpoint, the optimizer's among them."""
    name = f"step_{number * EACH:08d}"
    before, after = contents(chain[0] / f"to_{number - 1}" / name), contents(chain[0] / f"again_{number}" / name)
    moments = [key for key in before if "exp_avg" in key]
    assert len(moments) > 20
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


def test_ends_where_one_process_does(chain: tuple[Path, list[Seen]], whole: Seen) -> None:
    figures = [step for seen in chain[1] for step in seen.seen["figures"]]
    assert len(figures) == EACH * len(CHAIN)
    measured = differences(Seen({"figures": figures}, chain[1][-1].weights), whole)
    assert max(measured.values()) < BOUND, measured


def test_one_process_does_not_amplify_rounding(launcher: Launcher, whole: Seen, tmp_path: Path) -> None:
    """What the bound rests on: moving every weight to the next float32 at the start moves the end by less than it."""
    stored, generator = load_file(launcher.folder / "models/v3/model.safetensors"), torch.Generator().manual_seed(1)
    moved = {
        name: torch.nextafter(tensor, torch.where(torch.rand(tensor.shape, generator=generator) < 0.5, -inf, inf))
        for name, tensor in stored.items()
    }
    shutil.copytree(launcher.folder / "models/v3", launcher.folder / "models/moved")
    save_file(moved, launcher.folder / "models/moved/model.safetensors")
    part = stage(0, tmp_path) | {"end": EACH * len(CHAIN), "model": "moved"}
    measured = differences(launcher.run("chain_moved", {}, [part])["resume"], whole)
    assert 0 < max(measured.values()) < BOUND, measured


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["ep2", "tp2_pp2"])
def test_the_same_layout_goes_on_bit_for_bit(launcher: Launcher, tmp_path: Path, name: str, dtype: str) -> None:
    """Half the steps, a checkpoint, the other half: figures and weights of a run without a break."""
    runs = {
        "whole": stage(0, tmp_path / "whole") | {"end": 2 * EACH},
        "before": stage(0, tmp_path / "halves"),
        "after": stage(1, tmp_path / "halves"),
    }
    parts = [part | {"name": key, "section": {"dtype": dtype}} for key, part in runs.items()]
    found = launcher.run(f"same_{name}_{dtype}", LAYOUTS[name], parts)
    assert found["before"].seen["figures"] + found["after"].seen["figures"] == found["whole"].seen["figures"]
    assert found["after"].seen["end"] == found["whole"].seen["end"]


def test_in_bfloat16_the_masters_are_carried_over_too(launcher: Launcher, tmp_path: Path) -> None:
    """Another layout loads the float32 copies that the optimizer works on, not what bfloat16 left of them."""
    before, after = (
        launcher.run(f"masters_{number}", LAYOUTS[name], [stage(number, tmp_path) | {"section": {"dtype": "bfloat16"}}])
        for number, name in enumerate(["tp2_pp2", "ep2"])
    )
    assert after["resume"].seen["start"] == before["resume"].seen["end"]
    saved, again = (contents(tmp_path / folder / f"step_{EACH:08d}") for folder in ("to_0", "again_1"))
    assert saved.keys() == again.keys()
    assert [key for key in saved if not torch.equal(saved[key], again[key])] == []
    models = [key for key in saved if saved[key].dtype == torch.bfloat16]
    masters = {tuple(saved[key].shape): saved[key] for key in saved if saved[key].dtype == torch.float32}
    assert len(models) > 20
    assert any(not torch.equal(value, value.bfloat16().float()) for value in masters.values())


@pytest.fixture(scope="module")
def whole(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """All the chain's steps in one process, without a break."""
    part = stage(0, tmp_path_factory.mktemp("whole")) | {"end": EACH * len(CHAIN)}
    return launcher.run("chain_whole", {}, [part])["resume"]


def contents(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a distributed checkpoint, whole, by torch's own reader."""
    entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state
