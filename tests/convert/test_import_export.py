"""There and back again, bit for bit; Megatron loads what is imported."""

import json
from pathlib import Path

import pytest
import torch

from megatron_r1.checkpoint.source import MegatronSource, open_source
from megatron_r1.config.convert import CastConfig, ExportConfig, ImportConfig
from megatron_r1.config.sections import ModelSection, ParallelSection
from megatron_r1.convert.verbs import run_cast, run_export, run_import
from megatron_r1.errors import DataError
from megatron_r1.model.build import BuiltModel, build_model
from megatron_r1.model.mapping import weights
from megatron_r1.model.parallel import initialize
from tests.convert.invented import FP8, contents, same, tensors, tiny, write
from tests.model.dense_models import write_dense


def built(folder: Path, load: bool) -> BuiltModel:
    initialize(ParallelSection(), seed=0)
    section = ModelSection(path=folder, load_weights=load, dtype="bfloat16", mtp_loss_coef=0.3)
    return build_model(section, max_sequence_length=64)


def there_and_back(tmp_path: Path, source: Path, **export: object) -> Path:
    run_import(ImportConfig(source=source, output=tmp_path / "megatron"))
    run_export(ExportConfig(source=tmp_path / "megatron", output=tmp_path / "back", **export))
    return tmp_path / "back"


def test_bfloat16_comes_back_bit_for_bit(tmp_path: Path) -> None:
    source = write(tmp_path / "hf")
    (source / "tokenizer.json").write_text("{}")
    before = contents(source)
    back = there_and_back(tmp_path, source)
    assert same(tensors(back), tensors(source))
    assert json.loads((back / "config.json").read_text()) == tiny()
    assert (back / "tokenizer.json").exists()
    assert contents(source) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "megatron"]


@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "qwen3"])
def test_dense_families_come_back(tmp_path: Path, name: str) -> None:
    write_dense(tmp_path / "hf", name)
    back = there_and_back(tmp_path, tmp_path / "hf", max_shard_bytes=50_000)
    assert len(list(back.glob("*.safetensors"))) > 1
    assert same(tensors(back), tensors(tmp_path / "hf"))


def test_megatron_loads_what_was_imported(tmp_path: Path) -> None:
    from megatron.core import dist_checkpointing  # after megatron_r1.model has prepared it

    source, output = write(tmp_path / "hf"), tmp_path / "megatron"
    run_import(ImportConfig(source=source, output=output))
    assert (output / "latest_checkpointed_iteration.txt").read_text().strip() == "release"
    empty, expected = built(source, load=False).module, weights(built(source, load=True).module)
    state = dist_checkpointing.load({"model": empty.sharded_state_dict(prefix="")}, str(output / "release"))
    assert state["checkpoint_version"] == 3.0
    empty.load_state_dict(state["model"])
    ours = weights(empty)
    assert same(ours, expected)


def test_fp8_is_imported_as_it_dequantises_and_exported_to_the_same_bytes(tmp_path: Path) -> None:
    source = write(tmp_path / "hf", tiny(quantization_config=FP8, hidden_size=128))
    back = there_and_back(tmp_path, source, dtype="fp8")
    assert same(tensors(back), tensors(source))  # every block's largest number is e4m3's
    assert json.loads((back / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    run_cast(CastConfig(source=source, output=tmp_path / "cast", dtype="bfloat16"))
    run_export(ExportConfig(source=tmp_path / "megatron", output=tmp_path / "plain"))
    assert same(tensors(tmp_path / "plain"), tensors(tmp_path / "cast"))


def test_dtypes_change_where_they_are_asked_to(tmp_path: Path) -> None:
    source = write(tmp_path / "hf")
    run_import(ImportConfig(source=source, output=tmp_path / "megatron", dtype="float32"))
    run_export(ExportConfig(source=tmp_path / "megatron", output=tmp_path / "back", dtype="bfloat16"))
    run_export(ExportConfig(source=tmp_path / "megatron", output=tmp_path / "wide"))
    assert same(tensors(tmp_path / "back"), tensors(source))
    assert same(tensors(tmp_path / "wide"), {name: value.float() for name, value in tensors(source).items()})
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert tensors(tmp_path / "back")[bias].dtype == torch.float32


def test_parts_do_not_depend_on_the_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_r1.convert.target.SMALL_PART_BYTES", 50_000)
    monkeypatch.setattr("megatron_r1.convert.target.TASK_BYTES", 20_000)
    source = write(tmp_path / "hf")
    for workers in (1, 5):
        run_import(ImportConfig(source=source, output=tmp_path / f"megatron{workers}", workers=workers))
        options = {"dtype": "fp8", "max_shard_bytes": 100_000, "workers": workers}
        run_cast(CastConfig(source=source, output=tmp_path / f"hf{workers}", **options))
    assert len(list((tmp_path / "megatron1/release").glob("*.distcp"))) > 8
    for name in ("megatron", "hf"):
        one, five = (contents(tmp_path / f"{name}{workers}", "summary.json") for workers in (1, 5))
        assert one.keys() == five.keys()
        assert [path for path in one if one[path] != five[path]] == []


def test_a_stage_keeps_its_records_beside_the_model(tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    stage.mkdir()
    (stage / "stage.toml").write_text("")
    figures = run_cast(CastConfig(source=write(tmp_path / "hf"), output=stage, folder="hf", dtype="float32"))
    assert json.loads((stage / "summary.json").read_text()) == figures
    assert sorted(path.name for path in stage.iterdir()) == ["hf", "stage.toml", "summary.json"]


def test_a_checkpoint_without_a_config_takes_that_of_a_folder(tmp_path: Path) -> None:
    source = write(tmp_path / "hf")
    run_import(ImportConfig(source=source, output=tmp_path / "megatron"))
    release = (tmp_path / "megatron/release").rename(tmp_path / "iter_0000007")
    with pytest.raises(DataError, match="--config="):
        open_source(release)
    run_export(ExportConfig(source=release, config=source, output=tmp_path / "back"))
    assert same(tensors(tmp_path / "back"), tensors(source))
    smaller = tmp_path / "smaller"
    smaller.mkdir()
    (smaller / "config.json").write_text(json.dumps(tiny(vocab_size=300)))
    with pytest.raises(DataError, match=r"word_embeddings.weight has shape \[400, 64\].* makes it \[300, 64\]"):
        run_export(ExportConfig(source=release, config=smaller, output=tmp_path / "other"))


def test_a_megatron_source_reads_without_its_mtp_layers(tmp_path: Path) -> None:
    source = write(tmp_path / "hf")
    run_import(ImportConfig(source=source, output=tmp_path / "megatron"))
    opened = open_source(tmp_path / "megatron", mtp=False)
    assert isinstance(opened, MegatronSource)
    assert opened.unknown() == []
    run_export(ExportConfig(source=tmp_path / "megatron", output=tmp_path / "back", mtp=False))
    stored = tensors(source)
    trunk = {name: value for name, value in stored.items() if not name.startswith("model.layers.3.")}
    assert same(tensors(tmp_path / "back"), trunk)
