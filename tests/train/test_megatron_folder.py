"""What is trained from a Megatron folder is, bit for bit, what is trained from the folder that it was imported from."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from megatron_r1.checkpoint.source import weights as weights_of
from megatron_r1.config.convert import ImportConfig
from megatron_r1.config.load import validate
from megatron_r1.config.runs import CriticSection
from megatron_r1.config.sections import ModelSection, OptimSection, ParallelSection, PolicySection
from megatron_r1.config.sft import SFTConfig
from megatron_r1.convert.verbs import run_import
from megatron_r1.data.files import write_lines
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.model import hf_folder
from megatron_r1.model.build import BuiltModel, build_model
from megatron_r1.model.mapping import weights
from megatron_r1.model.parallel import initialize
from megatron_r1.model.scalar_head import SCORE
from megatron_r1.train import rl, sft
from megatron_r1.train.critic import Critic
from tests.convert.invented import FP8, contents, same, tensors, tiny, write
from tests.data.chat_rows import VOCABULARY, row, write_tokenizer
from tests.model.dense_models import write_dense
from tests.train import rank_program

ROOT = Path(__file__).parents[2]
Head = Literal["vocabulary", "scalar"] | None


def imported(folder: Path) -> Path:
    """Its Megatron folder."""
    output = folder.with_name(f"{folder.name}_megatron")
    run_import(ImportConfig(source=folder, output=output))
    assert not list(output.rglob("*.safetensors"))
    return output


def build(folder: Path, head: Head = None, mtp_loss_coef: float = 0.3) -> BuiltModel:
    """As the verbs build it."""
    initialize(ParallelSection(), seed=3)
    section = ModelSection(path=folder, dtype="float32", mtp_loss_coef=mtp_loss_coef)
    return build_model(section, 64, head, weights_of(folder))


def assert_same(found: BuiltModel, expected: BuiltModel) -> None:
    assert same(weights(found.module), weights(expected.module))
    assert same(found.map.passthrough, expected.map.passthrough)
    assert found.hf == expected.hf


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A causal model with an MTP layer, as a Hugging Face folder and as a Megatron folder."""
    folder = write(tmp_path_factory.mktemp("deepseek") / "hf")
    return folder, imported(folder)


@pytest.mark.parametrize("mtp_loss_coef", [0.3, 0.0], ids=["trained", "passed on"])
def test_with_multi_token_prediction(deepseek: tuple[Path, Path], mtp_loss_coef: float) -> None:
    expected, found = (build(folder, mtp_loss_coef=mtp_loss_coef) for folder in deepseek)
    assert_same(found, expected)
    prediction = [name for name in weights(found.module) if name.startswith("mtp.")]
    assert bool(prediction) != bool(found.map.passthrough)
    assert len(prediction) + len(found.map.passthrough) > 20


@pytest.mark.parametrize("name", ["llama_tied", "qwen2"])
def test_dense(name: str, tmp_path: Path) -> None:
    """Grouped queries, biases; one embedding for both ends."""
    write_dense(tmp_path / "hf", name)
    expected, found = build(tmp_path / "hf"), build(imported(tmp_path / "hf"))
    assert_same(found, expected)
    assert ("output_layer.weight" in weights(found.module)) == (name != "llama_tied")


def test_a_causal_model_gets_the_same_new_scalar_head(deepseek: tuple[Path, Path], tmp_path: Path) -> None:
    expected, found = (build(folder, head="scalar") for folder in deepseek)
    assert_same(found, expected)
    assert weights(found.module)["output_layer.weight"].shape == (1, 64)
    hf_folder.write(tmp_path / "hf", expected.hf, expected.export(torch.bfloat16))
    reward_model, again = build(tmp_path / "hf"), build(imported(tmp_path / "hf"))
    assert_same(again, reward_model)
    score = tensors(tmp_path / "hf")[SCORE].float()
    assert torch.equal(weights(again.module)["output_layer.weight"], score)


def test_tensors_that_config_json_has_no_place_for_are_not_left_out_in_silence(
    deepseek: tuple[Path, Path], tmp_path: Path
) -> None:
    shallow = tmp_path / "shallow"
    shallow.mkdir()
    (shallow / "release").symlink_to(deepseek[1] / "release")
    (shallow / "latest_checkpointed_iteration.txt").write_text("release")
    (shallow / "config.json").write_text(json.dumps(tiny(num_hidden_layers=2)))
    with pytest.raises(DataError, match=r"decoder\.layers\.2\."):
        build(shallow)
    (shallow / "config.json").write_text(json.dumps(tiny(num_hidden_layers=4)))
    with pytest.raises(DataError, match=r"has no model\.layers\.3\..*decoder\.layers\.3\."):
        build(shallow)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with its tokenizer; float32, an MTP layer that passes through."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(tiny(vocab_size=VOCABULARY, torch_dtype="float32")))
    initialize(ParallelSection(), seed=1)
    section = ModelSection(path=folder, load_weights=False, dtype="float32", init_std=0.08)
    model = build_model(section, 64)
    hf_folder.write(folder / "hf", model.hf, model.export(torch.float32), tokenizer)
    write_lines(folder / "chats.jsonl", [row(number) for number in range(3, 9)])
    imported(folder / "hf")
    return folder


def tree(base: Path, model: str, output: Path) -> dict[str, Any]:
    """Two steps of fine-tuning."""
    return {
        "output": str(output / model),
        "data": [str(base / "chats.jsonl")],
        "model": {"path": str(base / model), "dtype": "float32"},
        "batch": 3,
        "max_length": 64,
        "tokens_per_microbatch": 70,
        "epochs": 1,
        "report": {"console": False, "tensorboard": False},
        "optim": {"lr": 1e-2, "weight_decay": 0.0},
    }


def assert_trained_alike(base: Path, output: Path) -> None:
    expected, found = (output / model / "hf" for model in ("hf", "hf_megatron"))
    assert contents(found) == contents(expected)
    before, after = tensors(base / "hf"), tensors(found)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(moved) > 50
    copies = {"model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"}
    assert {name for name in moved if name.startswith("model.layers.3.")} <= copies


def test_fine_tuning(base: Path, tmp_path: Path) -> None:
    for model in ("hf", "hf_megatron"):
        summary = sft.run(validate(SFTConfig, tree(base, model, tmp_path), where="test"))
        assert summary["steps"] == 2
    assert_trained_alike(base, tmp_path)


def test_fine_tuning_in_two_processes(base: Path, tmp_path: Path) -> None:
    (tmp_path / "runs.json").write_text(json.dumps([tree(base, model, tmp_path) for model in ("hf", "hf_megatron")]))
    command = [sys.executable, "-m", "tests.train.megatron_folder_program", str(tmp_path / "runs.json")]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    assert_trained_alike(base, tmp_path)


@pytest.mark.parametrize("below", ["", "release"])
def test_reinforcement_learning_refuses_what_its_engines_cannot_load(
    deepseek: tuple[Path, Path], tmp_path: Path, below: str
) -> None:
    folder = deepseek[1] / below
    with pytest.raises(ConfigError, match=rf"{folder} is a Megatron checkpoint.* `megatron-r1 export`"):
        rl.run(rank_program.config(folder, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_reinforcement_learning_refuses_quantised_weights(deepseek: tuple[Path, Path], tmp_path: Path) -> None:
    folder = write(tmp_path / "fp8", tiny(quantization_config=FP8, hidden_size=128))
    with pytest.raises(ConfigError, match=rf"{folder} holds quantised weights.* `megatron-r1 cast`"):
        rl.run(rank_program.config(folder, tmp_path / "run"))
    with pytest.raises(DataError, match="holds no tokenizer"):  # this one gets further
        rl.run(rank_program.config(deepseek[0], tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_critic_begins_from_a_megatron_folder(deepseek: tuple[Path, Path], tmp_path: Path) -> None:
    found = []
    for folder in deepseek:
        section = CriticSection(path=folder, optim=OptimSection(lr=1e-2))
        model = PolicySection(path=deepseek[0], dtype="float32")
        config = rank_program.config(deepseek[0], tmp_path).model_copy(update={"model": model})
        initialize(ParallelSection(), seed=3)
        found.append(weights(Critic(config, section).scorer.model.module))
    assert same(*found)
