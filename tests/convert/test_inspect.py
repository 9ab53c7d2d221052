"""What inspect says, against published totals, transformers' own models, and damage done by hand."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from rich.console import Console
from safetensors.torch import load_file, save_file

from megatron_r1.config.convert import ImportConfig
from megatron_r1.config.inspect import InspectConfig
from megatron_r1.convert import inspect as verb
from megatron_r1.convert.verbs import run_import
from megatron_r1.errors import DataError
from tests.convert.invented import FP8, tiny, write
from tests.model.dense_models import write_dense
from tests.model.moe_models import write_moe
from tests.tools.test_smollm2 import SHAPE, write_gguf


def inspect(path: Path, **options: Any) -> dict[str, Any]:
    result = verb.inspect(InspectConfig(path=path, **options))
    assert json.loads(json.dumps(result)) == result
    assert result["passed"] == (not result["problems"])
    return result


def shown(result: dict[str, Any]) -> str:
    text = io.StringIO()
    verb.show(result, Console(file=text, width=200))
    return text.getvalue()


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2", "qwen3"])
def test_a_dense_model_has_as_many_parameters_as_in_transformers(name: str, tmp_path: Path) -> None:
    model = write_dense(tmp_path, name)
    result = inspect(tmp_path, check=True)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert result["passed"]
    assert result["parameters"] == {"main": total, "activated": total, "mtp": 0, "total": total}
    assert result["stored"]["bytes"] == 4 * result["stored"]["elements"]
    assert list(result["dtypes"]) == ["float32"]


@pytest.mark.parametrize(("name", "layers"), [("qwen3_moe", 2), ("mixtral", 2), ("deepseek_v3", 2)])
def test_a_token_meets_only_its_experts(name: str, layers: int, tmp_path: Path) -> None:
    model = write_moe(tmp_path, name)
    hf = json.loads((tmp_path / "config.json").read_text())
    count = hf.get("n_routed_experts") or hf.get("num_local_experts") or hf.get("num_experts")
    expert = 3 * hf["hidden_size"] * (hf.get("moe_intermediate_size") or hf["intermediate_size"])
    idle = layers * (count - hf["num_experts_per_tok"]) * expert
    biases = layers * count if name == "deepseek_v3" else 0  # a buffer in transformers
    total = sum(parameter.numel() for parameter in model.parameters()) + biases
    result = inspect(tmp_path)
    assert result["parameters"]["main"] == total
    assert result["parameters"]["activated"] == total - idle - biases


def test_fp8_blocks_and_what_stands_beside_the_weights(tmp_path: Path) -> None:
    folder = write(tmp_path / "fp8", tiny(quantization_config=FP8, hidden_size=128))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    result = inspect(folder, check=True, tensors=True)
    stored = load_file(folder / "model.safetensors")
    weights = [name for name, value in stored.items() if value.dtype is torch.float8_e4m3fn]
    assert result["passed"]
    assert result["fp8"] == {
        "weights": len(weights),
        "scales": len(weights),
        "block": [128, 128],
        "scale_dtype": "float32",
    }
    assert {entry["name"] for entry in result["tensors"]} == stored.keys()
    assert sum(entry["bytes"] for entry in result["tensors"]) == sum(value.nbytes for value in stored.values())
    assert result["tokenizer"] == ["tokenizer.json"]
    assert result["chat_template"]
    assert result["files"] == {"model.safetensors": (folder / "model.safetensors").stat().st_size}
    plain = inspect(write(tmp_path / "plain", tiny(hidden_size=128)))
    assert plain["parameters"] == result["parameters"]
    assert plain["fp8"] is None
    assert not plain["chat_template"]


def test_every_problem_is_listed_at_once(tmp_path: Path) -> None:
    write_dense(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    down = "model.layers.0.mlp.down_proj.weight"
    tensors["model.layers.7.mlp.down_proj.weight"] = tensors.pop(down)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]
    names = sorted(tensors)
    for number in range(3):
        shard = {name: tensors[name].contiguous() for name in names[number::3]}
        save_file(shard, tmp_path / f"{number}.safetensors")
    whole = inspect(tmp_path, check=True)
    assert sorted(whole["problems"]) == [
        f"{down} is missing",
        "model.layers.7.mlp.down_proj.weight is known to no rule of LlamaForCausalLM",
        "model.norm.weight has shape [71], but config.json makes it [72]",
    ]
    for number in (0, 2):
        file = tmp_path / f"{number}.safetensors"
        file.write_bytes(file.read_bytes()[:-5])
    damaged = inspect(tmp_path)["problems"]
    for number in (0, 2):
        assert sum(f"{number}.safetensors is truncated" in problem for problem in damaged) == 1
    assert not any("1.safetensors is truncated" in problem for problem in damaged)


def test_an_index_that_names_a_missing_file(tmp_path: Path) -> None:
    write_dense(tmp_path, "llama")
    index = {"weight_map": dict.fromkeys(load_file(tmp_path / "model.safetensors"), "gone.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    result = inspect(tmp_path)
    assert "gone.safetensors, which is not there" in result["problems"][0]
    assert "gone.safetensors" in shown(result)
    assert result["stored"]["tensors"] == len(index["weight_map"])


def test_a_config_that_denies_the_quantisation(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", tiny(quantization_config=FP8, hidden_size=128))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    assert inspect(folder)["problems"] == ["tensors are FP8, but config.json has no quantization_config"]


def test_an_unknown_architecture_is_still_described(tmp_path: Path) -> None:
    write_dense(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamoForCausalLM"]}))
    result = inspect(tmp_path)
    assert result["family"] is None
    assert result["parameters"] is None
    assert "LlamaForCausalLM" in result["problems"][0]
    assert result["stored"]["tensors"] == len(load_file(tmp_path / "model.safetensors"))
    assert "not supported" in shown(result)


def test_a_megatron_checkpoint_with_and_without_its_config(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf")
    run_import(ImportConfig(source=folder, output=tmp_path / "megatron", workers=1))
    before, after = inspect(folder), inspect(tmp_path / "megatron")
    assert after["format"] == "megatron torch_dist"
    assert after["passed"]
    assert after["parameters"] == before["parameters"]
    bare = tmp_path / "bare"
    (tmp_path / "megatron" / "release").rename(bare)
    without = inspect(bare)
    assert "config.json" in without["problems"][0]
    assert without["stored"]["bytes"] == after["stored"]["bytes"]
    assert inspect(bare, config=folder)["parameters"] == before["parameters"]


def test_a_gguf_file(tmp_path: Path) -> None:
    model = write_dense(tmp_path / "made", "llama_tied", **dict[str, Any](SHAPE))
    result = inspect(write_gguf(tmp_path / "m.gguf", model, GGMLQuantizationType.Q4_1), tensors=True)
    assert result["format"] == "gguf"
    assert result["passed"]
    assert result["parameters"]["main"] == sum(parameter.numel() for parameter in model.parameters())
    assert "tokenizer.json" in result["tokenizer"]
    assert len(result["tensors"]) == len(model.state_dict()) - 1  # the head is the embedding
    assert result["stored"]["bytes"] < result["files"]["m.gguf"]


def test_nothing_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        inspect(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"config\.json"):
        inspect(tmp_path)
