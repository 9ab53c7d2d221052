"""There and back again, bit for bit; Megatron loads what is imported."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from megatron_r1.checkpoint.source import MegatronSource, open_source
from megatron_r1.config.convert import CastConfig, ExportConfig, ImportConfig
from megatron_r1.config.inspect import VerifyConfig
from megatron_r1.config.sections import ModelSection, ParallelSection
from megatron_r1.convert.verbs import run_cast, run_export, run_import
from megatron_r1.convert.verify import verify
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.model.build import BuiltModel, build_model
from megatron_r1.model.mapping import weights
from megatron_r1.model.parallel import initialize
from tests.convert.invented import FP8, contents, same, tensors, tiny, write
from tests.model.dense_models import write_dense
from tests.model.moe_models import MOE_MODELS, write_moe

COPIES = {
    "model.layers.3.embed_tokens.weight": "model.embed_tokens.weight",
    "model.layers.3.shared_head.head.weight": "lm_head.weight",
}
"""What DeepSeek's MTP layer holds again (DeepSeek-V3, README_WEIGHTS)."""


def built(folder: Path, load: bool) -> BuiltModel:
    """Read without our Megatron checkpoints, by what tests/model compares with transformers."""
    initialize(ParallelSection(), seed=0)
    dtype = json.loads((folder / "config.json").read_text()).get("torch_dtype", "float32")
    section = ModelSection(path=folder, load_weights=load, dtype=dtype, mtp_loss_coef=0.3)
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
    stored = tensors(back)
    assert same(stored, tensors(source))
    for copy, name in COPIES.items():  # the source was made by what is tested here, so it may lack them as well
        assert torch.equal(stored[copy], stored[name])
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


def test_a_tied_head_that_is_stored_all_the_same(tmp_path: Path) -> None:
    source = tmp_path / "hf"
    write_dense(source, "llama_tied")
    stored = tensors(source)
    head = stored["model.embed_tokens.weight"].clone()
    save_file(stored | {"lm_head.weight": head}, source / "model.safetensors")
    assert same(tensors(there_and_back(tmp_path, source)), stored)
    head[-1, -1] += 1
    save_file(stored | {"lm_head.weight": head}, source / "model.safetensors")
    with pytest.raises(DataError, match=r"lm_head\.weight differs from .*tie_word_embeddings = false"):
        run_import(ImportConfig(source=source, output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_layer_that_config_json_does_not_know_is_not_left_behind(tmp_path: Path) -> None:
    run_import(ImportConfig(source=write(tmp_path / "hf"), output=tmp_path / "megatron"))
    shallow = tmp_path / "shallow"
    shallow.mkdir()
    (shallow / "config.json").write_text(json.dumps(tiny(num_hidden_layers=2)))
    with pytest.raises(DataError, match=r"holds \d+ tensors: decoder\.layers\.2\..* config\.json has no place for"):
        run_export(ExportConfig(source=tmp_path / "megatron", config=shallow, output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["deepseek", "llama_tied", "qwen2", "qwen3_moe"])
def test_megatron_loads_what_was_imported(tmp_path: Path, name: str) -> None:
    """Each row where Megatron has it: there and back again, rows that are out of order would come back as well."""
    from megatron.core import dist_checkpointing  # after megatron_r1.model has prepared it

    source, output = tmp_path / "hf", tmp_path / "megatron"
    if name == "deepseek":
        write(source)
    else:
        (write_moe if name in MOE_MODELS else write_dense)(source, name)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_finer_numbers_are_rounded_to_bfloat16_before_they_are_fp8(tmp_path: Path, dtype: torch.dtype) -> None:
    """FP8 dequantises to that, so the folder comes back byte for byte; and is the one that is made of bfloat16."""
    source = write(tmp_path / "hf", tiny(hidden_size=160))
    stored = tensors(source)
    for name, value in stored.items():
        if name.endswith("_proj.weight"):
            stored[name] = (value.float() * (1 + torch.rand(value.shape) / 64)).to(dtype)
    save_file(stored, source / "model.safetensors")
    made = []
    for name, origin, wanted in (("fp8", "hf", "fp8"), ("again", "fp8", "fp8"), ("bf16", "hf", "bfloat16")):
        run_cast(CastConfig(source=tmp_path / origin, output=tmp_path / name, dtype=wanted))
        made.append(tensors(tmp_path / name))
    assert same(made[1], made[0])
    run_cast(CastConfig(source=tmp_path / "bf16", output=tmp_path / "other", dtype="fp8"))
    scaled = [name for name in made[0] if name.endswith("_scale_inv")]
    other = tensors(tmp_path / "other")
    assert scaled
    for name in scaled:
        weight = name.removesuffix("_scale_inv")
        assert torch.equal(other[name], made[0][name])
        assert torch.equal(other[weight].view(torch.uint8), made[0][weight].view(torch.uint8))


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
        options = {"dtype": "fp8", "max_shard_bytes": 100_000, "workers": workers, "name": "title"}
        run_cast(CastConfig(source=source, output=tmp_path / f"hf{workers}", **options))
    assert len(list((tmp_path / "megatron1/release").glob("*.distcp"))) > 8
    for name in ("megatron", "hf"):
        one, five = (contents(tmp_path / f"{name}{workers}", "summary.json") for workers in (1, 5))
        assert one.keys() == five.keys()
        assert [path for path in one if one[path] != five[path]] == []


def test_an_exported_folder_has_a_card_and_what_stands_beside_the_weights(tmp_path: Path) -> None:
    source = write(tmp_path / "stage/hf", tiny(auto_map={"AutoConfig": "configuration_x.Config"}))
    beside = {
        "generation_config.json": '{"temperature": 0.6}',
        "chat_template.jinja": "{{ messages }}<think>",
        "LICENSE": "free",
    }
    for name, text in beside.items():
        (source / name).write_text(text)
    lineage = {"stage": "r1", "verb": "rl", "key": "k" * 64, "config": {}, "inputs": {}, "files": {}, "outputs": {}}
    (tmp_path / "stage/lineage.json").write_text(json.dumps(lineage | {"code": {"version": "0.1.0"}}))
    run_cast(CastConfig(source=source, output=tmp_path / "out", dtype="fp8", license="mit", base_model="lab/base"))
    assert {name: (tmp_path / "out" / name).read_text() for name in beside} == beside
    text = (tmp_path / "out/README.md").read_text()
    data = ModelCard(text).data
    assert (data.license, data.base_model, data.model_name) == ("mit", "lab/base", "out")
    assert "written by `megatron-r1 cast`" in text
    assert "The model was made by the stage `r1` (`rl`)" in text
    assert "Quantization | fp8, e4m3" in text
    assert "temperature=0.6" in text
    assert str(tmp_path) not in text + (tmp_path / "out/conversion.json").read_text()
    # the Python files that auto_map names are not copied, and AutoConfig would look for them
    assert "auto_map" not in json.loads((tmp_path / "out/config.json").read_text())


def test_a_bad_lineage_is_told_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(DataError, match="is not the lineage"):
        run_cast(CastConfig(source=write(tmp_path / "hf"), output=tmp_path / "out", lineage=tmp_path / "bad.json"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.json", "hf"]


def test_numbers_too_large_for_float16_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "hf")
    stored = tensors(source)
    stored["model.norm.weight"] = torch.full_like(stored["model.norm.weight"], 70_000)
    save_file(stored, source / "model.safetensors")
    with pytest.raises(DataError, match=r"model\.norm\.weight holds 70144, too large for float16"):
        run_cast(CastConfig(source=source, output=tmp_path / "out", dtype="float16"))
    with pytest.raises(DataError, match="too large for float16"):
        run_import(ImportConfig(source=source, output=tmp_path / "out", dtype="float16"))


def test_a_training_checkpoint_finds_the_folder_of_its_run(tmp_path: Path) -> None:
    source = write(tmp_path / "run/hf")
    run_import(ImportConfig(source=source, output=tmp_path / "megatron"))
    step = tmp_path / "run/checkpoints/step_00000002"
    step.parent.mkdir()
    (tmp_path / "megatron/release").rename(step)
    run_export(ExportConfig(source=step, output=tmp_path / "back"))
    assert same(tensors(tmp_path / "back"), tensors(source))
    with pytest.raises(ConfigError, match="is a Megatron checkpoint; `export`"):
        run_cast(CastConfig(source=step, output=tmp_path / "cast"))
    with pytest.raises(DataError, match=r"run has no config.json.*below it are .*step_00000002.*hf"):
        open_source(tmp_path / "run")


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


def test_mtp_layers_that_a_policy_lacks_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its `config.json` names them, since engines get them from the base model."""
    source = write(tmp_path / "hf")
    run_import(ImportConfig(source=source, output=tmp_path / "megatron", mtp=False))
    capsys.readouterr()
    run_export(ExportConfig(source=tmp_path / "megatron/release", config=source, output=tmp_path / "back"))
    assert (
        "has none of the multi-token-prediction layers of its config.json: leaves them out" in capsys.readouterr().out
    )
    assert json.loads((tmp_path / "back/config.json").read_text())["num_nextn_predict_layers"] == 0
    trunk = {name: value for name, value in tensors(source).items() if not name.startswith("model.layers.3.")}
    assert same(tensors(tmp_path / "back"), trunk)
    found = verify(VerifyConfig(a=tmp_path / "megatron/release", b=tmp_path / "back", config=source))
    assert found["identical"]
