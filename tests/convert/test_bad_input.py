"""Whatever is wrong with a source or target is told in one sentence; the source stays as it was, the target absent."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_r1.checkpoint.source import weights
from megatron_r1.checkpoint.store import Checkpoints
from megatron_r1.config.checkpoint import CheckpointSection
from megatron_r1.config.convert import CastConfig, ExportConfig, ImportConfig
from megatron_r1.config.inspect import InspectConfig, VerifyConfig
from megatron_r1.convert import verbs
from megatron_r1.convert.inspect import inspect
from megatron_r1.convert.verbs import run_cast, run_export, run_import
from megatron_r1.convert.verify import verify
from megatron_r1.convert.work import write_parts
from megatron_r1.errors import UserError
from tests.checkpoint.conftest import make, train
from tests.convert.invented import FP8, contents, tiny, write

INDEX = "model.safetensors.index.json"
GATE = "model.layers.0.mlp.gate_proj.weight"
SCALE = f"{GATE}_scale_inv"
NOBODY = 65534


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FP8 checkpoint in several files."""
    folder = tmp_path_factory.mktemp("bad")
    write(folder / "plain", tiny(hidden_size=128))
    run_cast(CastConfig(source=folder / "plain", output=folder / "hf", dtype="fp8", max_shard_bytes=400_000))
    return folder / "hf"


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    copy = tmp_path / "in" / "hf"
    copy.mkdir(parents=True)
    for path in whole.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def holding(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def change(folder: Path, name: str, value: torch.Tensor | None) -> None:
    """Replace a tensor in its file; None = remove it, from the index too."""
    file = holding(folder, name)
    stored = load_file(file)
    stored.pop(name)
    if value is None:
        index = json.loads((folder / INDEX).read_text())
        del index["weight_map"][name]
        (folder / INDEX).write_text(json.dumps(index))
    else:
        stored[name] = value
    save_file(stored, file)


def truncated(folder: Path) -> None:
    os.truncate(holding(folder, GATE), holding(folder, GATE).stat().st_size - 100)


def truncated_header(folder: Path) -> None:
    os.truncate(holding(folder, GATE), 50)


def missing_file(folder: Path) -> None:
    holding(folder, GATE).unlink()


def two_of_one_name(folder: Path) -> None:
    (folder / INDEX).unlink()
    save_file({GATE: torch.zeros(2)}, folder / "z.safetensors")


def missing_scale(folder: Path) -> None:
    change(folder, SCALE, None)


def nan_scale(folder: Path) -> None:
    change(folder, SCALE, torch.full_like(load_file(holding(folder, SCALE))[SCALE], float("nan")))


def infinite_scale(folder: Path) -> None:
    change(folder, SCALE, torch.full_like(load_file(holding(folder, SCALE))[SCALE], float("inf")))


def wrong_shape(folder: Path) -> None:
    change(folder, "model.norm.weight", torch.zeros(64, dtype=torch.bfloat16))


def wrong_dtype(folder: Path) -> None:
    change(folder, "model.norm.weight", torch.zeros(128, dtype=torch.float16))


def set_in_config(folder: Path, **changed: object) -> None:
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(hf | changed))


def unknown_architecture(folder: Path) -> None:
    set_in_config(folder, architectures=["Gpt5ForCausalLM"])


def size_in_quotes(folder: Path) -> None:
    set_in_config(folder, hidden_size="64")


def fewer_than_no_layers(folder: Path) -> None:
    set_in_config(folder, num_hidden_layers=-1)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


DAMAGES: dict[Callable[[Path], None], str] = {
    truncated: r"is truncated: 100 of its",
    truncated_header: r"truncated",
    missing_file: r"index.json names model-0000\d-of-0000\d.safetensors, which is not there",
    two_of_one_name: rf"{GATE} is in both",
    missing_scale: rf"{GATE} is FP8, but the checkpoint has no {SCALE}",
    nan_scale: rf"{SCALE} holds nan",
    infinite_scale: rf"{SCALE} holds inf",
    wrong_shape: r"model.norm.weight has shape \[64\], but config.json makes it \[128\]",
    wrong_dtype: r"model.norm.weight is stored in float16, but config.json says bfloat16",
    unknown_architecture: r"'Gpt5ForCausalLM' is not supported",
    size_in_quotes: r"config\.json: hidden_size = '64' has to be a whole number above 0",
    fewer_than_no_layers: r"config\.json: num_hidden_layers = -1 has to be a whole number above 0",
    no_config: r"has no config\.json",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_sources(folder: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    damage(folder)
    before = contents(folder)
    with pytest.raises(UserError, match=DAMAGES[damage]):
        run_import(ImportConfig(source=folder, output=tmp_path / "out"))
    assert contents(folder) == before
    assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"in", "out.partial"}  # finished parts, where data was bad


def test_a_damaged_tensor_is_read_again_once_it_is_mended(folder: Path, tmp_path: Path) -> None:
    scale = load_file(holding(folder, SCALE))[SCALE]
    nan_scale(folder)
    with pytest.raises(UserError, match="holds nan"):
        run_import(ImportConfig(source=folder, output=tmp_path / "out"))
    change(folder, SCALE, scale)
    run_import(ImportConfig(source=folder, output=tmp_path / "out"))
    assert (tmp_path / "out/config.json").exists()


def test_damaged_megatron_checkpoints(folder: Path, tmp_path: Path) -> None:
    megatron = tmp_path / "megatron"
    run_import(ImportConfig(source=folder, output=megatron))
    part = megatron / "release/__0_0.distcp"
    stored = part.read_bytes()
    part.write_bytes(stored[: len(stored) // 2])
    with pytest.raises(UserError, match=r"__0_0\.distcp"):
        run_export(ExportConfig(source=megatron, output=tmp_path / "out"))
    part.unlink()
    with pytest.raises(UserError, match=r"__0_0\.distcp is missing"):
        run_export(ExportConfig(source=megatron, output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_damaged_training_checkpoints(tmp_path: Path) -> None:
    """Four bytes in the midst of the numbers: every header is right."""
    policy = make(tmp_path, num_hidden_layers=2, torch_dtype="float32")
    train(policy, 0, 1)
    Checkpoints(tmp_path / "checkpoints", CheckpointSection(), {}).save(1, policy.trainable, {}, {})
    step, out = tmp_path / "checkpoints/step_00000001", tmp_path / "out"
    checked = InspectConfig(path=step, config=tmp_path, check=True)
    assert inspect(checked)["passed"]
    run_export(ExportConfig(source=step, config=tmp_path, output=tmp_path / "whole"))
    part = step / "__0_0.distcp"
    stored = bytearray(part.read_bytes())
    middle = slice(len(stored) // 2, len(stored) // 2 + 4)
    stored[middle] = bytes(0xFF - byte for byte in stored[middle])
    part.write_bytes(stored)
    for read in (
        lambda: run_export(ExportConfig(source=step, config=tmp_path, output=out)),
        lambda: run_import(ImportConfig(source=step, config=tmp_path, output=out)),
        lambda: verify(VerifyConfig(a=tmp_path / "whole", b=step, config=tmp_path)),
        lambda: weights(step),
    ):
        with pytest.raises(UserError, match=r"step_00000001 is damaged \(__0_0\.distcp has been altered"):
            read()
    assert not out.exists()
    assert inspect(checked)["problems"] == ["__0_0.distcp has been altered: its checksum is another"]


@pytest.fixture
def unprivileged(tmp_path: Path) -> Iterator[None]:
    """For the superuser nothing is read-only."""
    if os.geteuid():
        yield
        return
    for path in (tmp_path, *tmp_path.parents):
        if path.is_relative_to("/tmp") and path != Path("/tmp"):
            path.chmod(0o755)
    os.seteuid(NOBODY)
    yield
    os.seteuid(0)


def test_a_source_that_changes_while_it_is_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parts could be of two checkpoints."""
    config = ImportConfig(source=folder, output=tmp_path / "out")

    def and_change(*arguments: object) -> int:
        done = write_parts(*arguments)  # type: ignore[arg-type]
        change(folder, "model.norm.weight", torch.zeros(128, dtype=torch.bfloat16))
        return done

    with monkeypatch.context() as patched:
        patched.setattr(verbs, "write_parts", and_change)
        with pytest.raises(UserError, match="has changed while it was read"):
            run_import(config)
    assert not (tmp_path / "out").exists()
    run_import(config)
    assert (tmp_path / "out/config.json").exists()


def test_a_target_that_is_read_only(folder: Path, tmp_path: Path, unprivileged: None) -> None:
    if os.getuid():
        tmp_path.chmod(0o555)
    with pytest.raises(UserError, match=f"cannot write to {tmp_path}: no permission"):
        run_cast(CastConfig(source=folder, output=tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    if os.getuid():
        tmp_path.chmod(0o755)


def test_a_target_below_a_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Not a directory"):
        run_cast(CastConfig(source=folder, output=tmp_path / "file/out"))


def test_checkpoint_of_pickles_is_not_loaded(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    source = tmp_path / "hf"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(tiny(quantization_config=FP8)))
    torch.save({"model.norm.weight": Trap()}, source / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickles"):
        run_import(ImportConfig(source=source, output=tmp_path / "out"))
    assert not (tmp_path / "sprung").exists()
