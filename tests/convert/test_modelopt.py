"""Export to nvidia-modelopt's unified format; the weights are read back by what the formats are, not by modelopt."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.quantization import get_quantization_config

from megatron_r1.config.inspect import InspectConfig
from megatron_r1.config.modelopt import QuantizeConfig
from megatron_r1.convert import modelopt
from megatron_r1.convert.inspect import inspect
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.model.hf_folder import TensorReader
from megatron_r1.model.safetensors_file import read, read_header
from tests.convert.invented import FP8, tiny, write
from tests.convert.quantized import expanded, installed, write_tokenizer
from tests.model.dense_models import write_dense

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("modelopt")
    write_dense(root / "llama", "llama", **SHAPE)
    write(root / "v3")
    for name in ("llama", "v3"):
        write_tokenizer(root / name)
    lines = [{"text": f"{number} and {number} are {2 * number}: {text}"} for number, text in enumerate("abcdefgh" * 4)]
    (root / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def quantize(folders: Path, name: str, form: str, **changes: Any) -> tuple[Path, dict[str, Any]]:
    output = folders / f"{name}_{form}"
    values = {"source": folders / name, "output": output, "format": form, "calibration": folders / "text.jsonl"}
    return output, modelopt.run_quantize(QuantizeConfig(**{**values, **changes}))


@installed
@pytest.mark.parametrize(
    ("form", "algorithm", "bound"), [("fp8", "FP8", 0.04), ("fp8_block", "fp8_pb_wo", 0.04), ("nvfp4", "NVFP4", 0.14)]
)
def test_weights_are_those_of_the_source(folders: Path, form: str, algorithm: str, bound: float) -> None:
    output, figures = quantize(folders, "llama", form)
    seen = inspect(InspectConfig(path=output))
    assert (seen["problems"], seen["quantized_by"], seen["fp8"]) == ([], f"modelopt {algorithm}", None)
    assert seen["parameters"] == inspect(InspectConfig(path=folders / "llama"))["parameters"]
    assert "written by `megatron-r1 quantize`" in (output / "README.md").read_text()
    recorded = json.loads((output / "hf_quant_config.json").read_text())["quantization"]
    assert recorded["quant_algo"] == algorithm
    stored = {name: read(entry) for name, entry in read_header(output / "model.safetensors").items()}
    before, quantised = TensorReader(folders / "llama"), 0
    for name in before:
        module = name.removesuffix(".weight")
        if f"{module}.weight_scale" not in stored:
            assert torch.equal(stored[name], before[name].bfloat16())
            continue
        error = (expanded(stored, module) - before[name]).norm() / before[name].norm()
        assert 0 < error < bound, name
        quantised += 1
    assert quantised == 2 * 7
    assert figures["tensors"] == len(stored)
    assert (output / "tokenizer.json").read_bytes() == (folders / "llama/tokenizer.json").read_bytes()


@installed
def test_int4_awq(folders: Path) -> None:
    """vLLM does not read this one of modelopt's formats."""
    output, _ = quantize(folders, "llama", "int4_awq")
    stored = {name: read(entry) for name, entry in read_header(output / "model.safetensors").items()}
    before = TensorReader(folders / "llama")
    for name in before:
        if name.endswith("down_proj.weight"):
            value = expanded(stored, name.removesuffix(".weight"))
            assert (value - before[name]).norm() / before[name].norm() < 0.2


@installed
@pytest.mark.parametrize("form", ["fp8", "fp8_block", "nvfp4"])
def test_deepseek_v3(folders: Path, form: str) -> None:
    """Experts one by one, as DeepSeek names them; the MTP layer, which transformers drops; config.json as it was."""
    output, _ = quantize(folders, "v3", form)
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (output, folders / "v3"))
    del config["quantization_config"]
    assert config == before
    names = read_header(output / "model.safetensors")
    assert {"model.layers.1.mlp.experts.7.up_proj.weight_scale", "model.layers.2.mlp.gate.weight"} <= names.keys()
    assert not {"model.layers.2.mlp.gate.weight_scale", "lm_head.weight_scale"} & names.keys()
    source = TensorReader(folders / "v3")
    mtp = [name for name in source if name.startswith("model.layers.3.")]
    assert len(mtp) > 30
    assert all(torch.equal(read(names[name]), source[name].bfloat16()) for name in mtp)


@installed
@pytest.mark.parametrize("form", ["fp8", "fp8_block", "nvfp4"])
def test_vllm_recognises_it(folders: Path, form: str) -> None:
    """Its parser, of both places where the format is recorded."""
    output = folders / f"v3_{form}"
    if not output.exists():
        quantize(folders, "v3", form)
    method = "modelopt_fp4" if form == "nvfp4" else "modelopt"
    recorded = json.loads((output / "hf_quant_config.json").read_text()) | {"quant_method": "modelopt"}
    for each in (recorded, json.loads((output / "config.json").read_text())["quantization_config"]):
        parser = get_quantization_config(method)
        assert (parser.override_quantization_method(each, None) or each["quant_method"]) == method
        parsed = parser.from_config(each)
        assert not parsed.is_layer_excluded("model.layers.1.mlp.experts.0.down_proj")
        for kept in ("model.layers.1.mlp.gate", "lm_head", "model.layers.3.mlp.experts.0.down_proj"):
            assert parsed.is_layer_excluded(kept)


@installed
def test_refused(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name a JSONL file of text with --calibration"):
        quantize(folders, "llama", "fp8", output=tmp_path / "out", calibration=None)
    with pytest.raises(DataError, match=r"cannot put .* into int4_awq: Cannot pack weight with input dimension 64"):
        quantize(folders, "v3", "int4_awq", output=tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").touch()
    with pytest.raises(ConfigError, match="exists already"):
        quantize(folders, "llama", "fp8", output=tmp_path / "full")
    write(tmp_path / "quantised", tiny(quantization_config=FP8, hidden_size=128))
    with pytest.raises(DataError, match="quantised already"):
        quantize(folders, "llama", "fp8", source=tmp_path / "quantised", output=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"full", "quantised"}


def test_package_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "hf").mkdir()
    config = QuantizeConfig(source=tmp_path / "hf", output=tmp_path / "out", format="fp8_block")
    with pytest.raises(ConfigError, match="nvidia-modelopt, which quantises, is not installed"):
        modelopt.run_quantize(config)
