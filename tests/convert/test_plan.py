"""Everything is checked before the first byte, and what is planned is what is written."""

import json
import re
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_r1.config.convert import CastConfig, ExportConfig, ImportConfig
from megatron_r1.convert.budget import ByteBudget
from megatron_r1.convert.verbs import run_cast, run_export, run_import
from megatron_r1.errors import ConfigError, DataError
from tests.convert.invented import FP8, tiny, write
from tests.model.dense_models import write_dense

NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("plan") / "hf")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to damage."""
    copy = tmp_path / "hf"
    copy.mkdir()
    for path in whole.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors (dots as two underscores), None = remove."""
    file = folder / "model.safetensors"
    stored = load_file(file)
    for key, value in tensors.items():
        name = key.replace("__", ".")
        stored.pop(name, None)
        if value is not None:
            stored[name] = value
    save_file(stored, file)


def refused(folder: Path, **options: object) -> str:
    """What importing it says; nothing may be left behind."""
    before = sorted(folder.parent.iterdir())
    with pytest.raises((ConfigError, DataError)) as error:
        run_import(ImportConfig(**{"source": folder, "output": folder.parent / "out", **options}))
    assert sorted(folder.parent.iterdir()) == before
    return str(error.value)


def test_missing_tensors_are_counted_and_the_first_named(folder: Path) -> None:
    experts = {f"model__layers__1__mlp__experts__{i}__up_proj__weight": None for i in range(7)}
    change(folder, **experts)
    said = refused(folder)
    assert said.startswith("the checkpoint lacks 7 tensors: model.layers.1.mlp.experts.0.up_proj.weight, ")
    assert said.endswith("experts.4.up_proj.weight, ...")


def test_missing_mtp_layers_come_with_a_way_out(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    change(folder, **{name.replace(".", "__"): None for name in stored if name.startswith("model.layers.3.")})
    assert "mtp = false (--no-mtp)" in refused(folder)
    change(folder, model__norm__weight=None)
    assert "mtp" not in refused(folder).partition("tensors: ")[0] + refused(folder).rpartition("...")[2]
    change(folder, model__norm__weight=stored["model.norm.weight"])
    assert run_import(ImportConfig(source=folder, output=folder.parent / "out", mtp=False, dry_run=True))[
        "tensors_read"
    ]


def test_unknown_tensors(folder: Path) -> None:
    change(folder, model__layers__1__mlp__gate__bias=torch.zeros(8))
    assert refused(folder) == (
        "the checkpoint holds one tensor: model.layers.1.mlp.gate.bias, which config.json has no place for"
    )


def test_a_shape_is_told_beside_the_one_that_is_due(folder: Path) -> None:
    change(folder, **{NORM.replace(".", "__"): torch.zeros(65, dtype=torch.bfloat16)})
    assert refused(folder) == f"{NORM} has shape [65], but config.json makes it [64]"


def test_dtypes(folder: Path, tmp_path: Path) -> None:
    change(folder, **{NORM.replace(".", "__"): torch.zeros(64, dtype=torch.float32)})
    said = refused(folder)
    assert said.startswith(f"{NORM} is stored in float32, but config.json says bfloat16; give --dtype")
    plan = run_import(ImportConfig(source=folder, output=tmp_path / "out", dtype="bfloat16", dry_run=True))
    assert plan["tensors_read"] > 0
    change(folder, **{NORM.replace(".", "__"): torch.zeros(64, dtype=torch.int64)})
    assert refused(folder, dtype="bfloat16") == f"{NORM} holds int64; weights are bfloat16 or float16 or float32"


@pytest.mark.parametrize("inside", ["", "deep/out"])
def test_source_and_output_must_be_apart(folder: Path, inside: str) -> None:
    assert "the source" in refused(folder, output=folder / inside)
    assert "lies in the output" in refused(folder, output=folder.parent)


def test_an_output_that_holds_something(folder: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("mine")
    assert "exists already" in refused(folder, output=taken)
    left = tmp_path / "other.partial"
    left.mkdir()
    (left / "thesis.txt").write_text("mine")
    assert "thesis.txt, which is of no conversion" in refused(folder, output=tmp_path / "other")
    assert (left / "thesis.txt").read_text() == (taken / "thesis.txt").read_text() == "mine"


def test_verbs_say_which_other_is_meant(folder: Path) -> None:
    with pytest.raises(ConfigError, match="`cast` makes a Hugging Face folder of another, or of GGUF"):
        run_export(ExportConfig(source=folder, output=folder.parent / "out"))


def test_more_than_the_disk_holds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    said = refused(folder)
    assert re.search(r"out needs 17\.\d MB \(17,\d{3},\d{3} bytes\), but its disk has 1\.0 MB free", said)


@pytest.mark.parametrize("dtype", ["float32", "fp8"])
def test_what_is_planned_is_written(whole: Path, tmp_path: Path, dtype: str) -> None:
    options = {"source": whole, "output": tmp_path / "out", "dtype": dtype, "max_shard_bytes": 200_000}
    plan = run_cast(CastConfig(**options, dry_run=True))
    assert not any(tmp_path.iterdir())
    run_cast(CastConfig(**options))
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    stored = [value for file in files for value in load_file(file).values()]
    assert len(files) == plan["parts"] > 1
    assert len(stored) == plan["tensors_written"]
    assert sum(value.nbytes for value in stored) == plan["bytes_written"]
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == plan["bytes_written"]
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}


def test_config_follows_the_weights(whole: Path, tmp_path: Path) -> None:
    def config(source: Path, **options: object) -> dict[str, object]:
        output = tmp_path / str(len([*tmp_path.iterdir()]))
        run_cast(CastConfig(source=source, output=output, **options))
        return json.loads((output / "config.json").read_text())

    assert config(whole, dtype="float16") == tiny(torch_dtype="float16")
    assert config(whole, dtype="fp8") == tiny(quantization_config=FP8)
    assert config(whole, dtype="fp8", scale_format="ue8m0")["quantization_config"] == FP8 | {"scale_fmt": "ue8m0"}
    assert config(tmp_path / "1", dtype="bfloat16") == tiny()
    assert config(whole, dtype="bfloat16", mtp=False) == tiny(num_nextn_predict_layers=0)
    write_dense(tmp_path / "llama", "llama")
    renamed = config(tmp_path / "llama", dtype="bfloat16")
    assert renamed["dtype"] == "bfloat16"
    assert "torch_dtype" not in renamed
    assert config(tmp_path / "llama", dtype="fp8")["quantization_config"]["modules_to_not_convert"] == ["lm_head"]


def test_a_budget_is_never_exceeded_and_who_needs_all_of_it_works_alone() -> None:
    budget, lock = ByteBudget(10), threading.Lock()
    held, most, alone = 0, 0, []

    def work(size: int) -> None:
        nonlocal held, most
        with budget.hold(size):
            with lock:
                held += size
                most = max(most, held if size <= 10 else 0)
            threading.Event().wait(0.002)
            with lock:
                if size > 10:
                    alone.append(held == size)
                held -= size

    threads = [threading.Thread(target=work, args=(size,)) for size in [3, 4, 50, 2, 9, 5, 50, 1, 10, 3] * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most <= 10
    assert alone == [True] * 6
