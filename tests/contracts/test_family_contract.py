"""What every model family keeps to; `--component FILE.py:NAME --model FOLDER` runs this on yours."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_r1.config.sections import ParallelSection
from megatron_r1.errors import DataError
from megatron_r1.model import hf_folder
from megatron_r1.model.build import build_model
from megatron_r1.model.family import Family, HFConfig
from megatron_r1.model.mapping import weights
from megatron_r1.model.parallel import initialize
from megatron_r1.model.rotary import rotary_arguments
from megatron_r1.registry import BUILT_IN, resolve
from tests.contracts.built_in import FAMILIES
from tests.model.agreement import Pair, logits_agree
from tests.model.conftest import section
from tests.model.dense_models import MODELS, write_dense
from tests.model.moe_models import write_moe


@pytest.fixture(scope="module")
def family(family_section: dict[str, Any]) -> type[Family]:
    found: type[Family] = resolve("family", family_section["type"])
    return found


@pytest.fixture(scope="module")
def folder(
    family_section: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    """A model folder as transformers writes it."""
    if "model" not in family_section:
        given = request.config.getoption("model")
        if given is None:
            pytest.fail("--component names a model family: --model must name a folder with a tiny model of it")
        return Path(given)
    written = tmp_path_factory.mktemp("model")
    (write_dense if family_section["model"] in MODELS else write_moe)(written, family_section["model"])
    return written


@pytest.fixture(scope="module")
def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that the folder's files hold."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (no iteration)
    return tensors


@pytest.fixture(scope="module")
def pair(family_section: dict[str, Any], folder: Path) -> Pair:
    initialize(ParallelSection(), seed=0)
    known, name = BUILT_IN["family"], family_section["type"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(known, config(folder)["architectures"][0], known.get(name, name))  # what registers a family
        ours = build_model(section(folder, load_weights=True, balance_loss_coef=0.0), 64)
    return Pair(folder, ours, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


def config(folder: Path) -> HFConfig:
    read: HFConfig = json.loads((folder / "config.json").read_text())
    return read


def meaning(family: type[Family], hf: HFConfig) -> dict[str, Any]:
    """What a config.json says of the model, less the functions, which cannot be compared."""
    megatron = family.transformer_config(hf, section(load_weights=True))
    fields = {name: value for name, value in dataclasses.asdict(megatron).items() if not callable(value)}
    rotary = {} if megatron.multi_latent_attention else rotary_arguments(hf)
    return {**fields, **rotary, "rules": list(family.rules(hf))}


def test_every_built_in_is_held_to_the_contract() -> None:
    assert {part["type"] for part in FAMILIES} == set(BUILT_IN["family"])


def test_config_comes_back_from_transformers_with_the_same_meaning(
    family: type[Family], folder: Path, tmp_path: Path
) -> None:
    AutoConfig.from_pretrained(folder).save_pretrained(tmp_path)
    again = config(tmp_path) | {"architectures": config(folder)["architectures"]}
    assert meaning(family, again) == meaning(family, config(folder))


def test_config_with_positions_as_before_transformers_5(family: type[Family], folder: Path) -> None:
    """`rope_theta` and `rope_scaling`, as in checkpoints published until 2025."""
    hf = config(folder)
    rope = hf.get("rope_parameters")
    if rope is None:
        pytest.skip("the folder's config.json is of that kind itself")
    older = {key: value for key, value in hf.items() if key != "rope_parameters"}
    older["rope_theta"] = rope["rope_theta"]
    older["rope_scaling"] = None
    if rope["rope_type"] != "default":
        scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type")}
        older["rope_scaling"] = {"type": rope["rope_type"], **scaling}
    assert meaning(family, older) == meaning(family, hf)


def test_a_key_left_out_has_a_default_or_is_missed(family: type[Family], folder: Path) -> None:
    """Any other error than DataError would tell the user nothing."""
    hf = config(folder)
    missed = [error for key in hf.keys() - {"architectures", "vocab_size"} if (error := failure(family, hf, key))]
    assert missed, "a model of any size at all would be built"
    assert all("config.json" in error for error in missed), missed


def failure(family: type[Family], hf: HFConfig, left_out: str) -> str | None:
    try:
        meaning(family, {key: value for key, value in hf.items() if key != left_out})
    except DataError as error:
        return str(error)
    return None


def test_every_tensor_of_the_model_has_one_rule(pair: Pair) -> None:
    counts = Counter(rule.megatron for rule in pair.ours.map.rules)
    assert counts == Counter(weights(pair.ours.module).keys())


def test_every_tensor_of_the_checkpoint_is_used_once(pair: Pair, stored: dict[str, torch.Tensor]) -> None:
    rules = pair.ours.map.rules
    redundant = {name for rule in rules for name in rule.redundant}
    counts = Counter(name for rule in rules for name in (*rule.hf, *rule.copies))
    assert counts == Counter(stored.keys() - redundant)


def test_round_trip_is_bitwise(pair: Pair, stored: dict[str, torch.Tensor], tmp_path: Path) -> None:
    exported = pair.ours.export(torch.float32)
    hf_folder.write(tmp_path / "hf", pair.ours.hf, exported)
    assert config(tmp_path / "hf") == config(pair.folder)
    reader = hf_folder.TensorReader(tmp_path / "hf")
    redundant = {name for rule in pair.ours.map.rules for name in rule.redundant}
    assert set(reader) == stored.keys() - redundant
    for name in reader:
        assert torch.equal(reader[name].to(stored[name].dtype), stored[name]), name


def test_shapes_are_known_from_the_config_alone(pair: Pair, stored: dict[str, torch.Tensor]) -> None:
    """A rule cuts an empty tensor of the model's shape into those of the checkpoint: how conversions are planned."""
    ours = weights(pair.ours.module)
    for rule in pair.ours.map.rules:
        for name, part in zip(rule.hf, rule.cut(ours[rule.megatron].to("meta")), strict=True):
            assert part.shape == stored[name].shape, name


def test_logits_equal_transformers(pair: Pair) -> None:
    rows = pair.ours.hf["vocab_size"]
    logits_agree(pair, torch.randint(rows, (2, 48), generator=torch.Generator().manual_seed(1)))
