"""What a source shows of a folder, against safetensors' own reader."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_r1.checkpoint.source import HuggingFaceSource, hf_shapes, open_source
from megatron_r1.errors import DataError
from megatron_r1.model.build import rules
from megatron_r1.model.safetensors_file import Spec
from tests.convert.invented import FP8, tensors, tiny, write
from tests.model.dense_models import write_dense


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("source") / "hf")


def test_reads_what_the_file_holds(folder: Path) -> None:
    source, stored = open_source(folder), tensors(folder)
    assert isinstance(source, HuggingFaceSource)
    assert source.unknown() == []
    for rule in source.rules:
        for name, value in zip(rule.hf, source.read(rule), strict=True):
            assert name in source
            assert torch.equal(value, stored[name])
            assert source.spec(name) == Spec(stored[name].dtype, tuple(stored[name].shape))
    used = [spec for rule in source.rules for spec in source.stored(rule)]
    assert len(used) == len(stored)
    assert sum(spec.nbytes for spec in used) == sum(value.nbytes for value in stored.values())


def test_fp8_appears_dequantised_with_its_scales_counted(tmp_path: Path) -> None:
    folder = write(tmp_path / "fp8", tiny(quantization_config=FP8, hidden_size=128))
    source, stored = open_source(folder), tensors(folder)
    rule = next(rule for rule in source.rules if rule.megatron == "decoder.layers.0.mlp.linear_fc1.weight")
    for name, value in zip(rule.hf, source.read(rule), strict=True):
        scale = stored[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
        weight = stored[name].float()
        assert torch.equal(value, (weight * scale[: weight.size(0), : weight.size(1)]).bfloat16())
        assert source.spec(name) == Spec(torch.bfloat16, tuple(weight.shape))
    assert len(source.stored(rule)) == 4
    assert f"{rule.hf[0]}_scale_inv" not in source


def test_shapes_of_grouped_queries(tmp_path: Path) -> None:
    write_dense(tmp_path, "llama")
    source = open_source(tmp_path)
    rule = next(rule for rule in source.rules if "linear_qkv" in rule.megatron)
    assert hf_shapes(rule, source.places.places[rule.megatron]) == [(72, 72), (36, 72), (36, 72)]


def test_a_copy_must_be_equal_to_the_last_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "hf")
    file = folder / "model.safetensors"
    stored = load_file(file)
    copy = stored["model.layers.3.embed_tokens.weight"]
    copy[-1, -1] += 1.0
    save_file(stored, file)
    monkeypatch.setattr("megatron_r1.model.safetensors_file.STRIPE_BYTES", 1000)  # several stripes, a short one last
    source = open_source(folder)
    embedding = source.rules[0]
    with pytest.raises(DataError, match=r"model.layers.3.embed_tokens.weight differs from model.embed_tokens.weight"):
        source.read(embedding)
    copy[-1, -1] -= 1.0
    stored["model.layers.3.embed_tokens.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, file)
    assert torch.equal(open_source(folder).read(embedding)[0], stored["model.embed_tokens.weight"])
    del stored["model.layers.3.embed_tokens.weight"]  # not every checkpoint has it
    save_file(stored, file)
    assert len(open_source(folder).stored(embedding)) == 1


def test_without_mtp_layers_their_tensors_are_neither_due_nor_unknown(folder: Path) -> None:
    source = open_source(folder, mtp=False)
    assert source.hf["num_nextn_predict_layers"] == 0
    assert not any(rule.megatron.startswith("mtp.") for rule in source.rules)
    assert source.unknown() == []


def test_an_architecture_that_nobody_knows_is_told_with_the_nearest() -> None:
    with pytest.raises(DataError, match=r"'DeepseekV4ForCausalLM' is not supported, did you mean 'DeepseekV"):
        rules({"architectures": ["DeepseekV4ForCausalLM"]})


@pytest.mark.parametrize(
    ("tracker", "message"),
    [("release", "not a Megatron checkpoint of format torch_dist"), ("soon", "neither a number of steps nor")],
)
def test_a_tracker_that_names_nothing(tmp_path: Path, tracker: str, message: str) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(tracker)
    with pytest.raises(DataError, match=message):
        open_source(tmp_path)


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_source(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"is neither a folder nor a \.gguf file"):
        open_source(tmp_path / "file")
    with pytest.raises(DataError, match=r"config\.json"):
        open_source(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny()))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match="pickles"):
        open_source(tmp_path)
