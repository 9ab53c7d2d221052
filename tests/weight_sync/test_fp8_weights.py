"""Weights for engines in FP8 are, byte for byte, those of the folder that `cast` makes of the same policy."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_r1.config.convert import CastConfig
from megatron_r1.config.sections import ModelSection, ParallelSection
from megatron_r1.convert.verbs import run_cast
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.model import hf_folder
from megatron_r1.model.build import BuiltModel, build_model
from megatron_r1.model.hf_folder import TensorReader
from megatron_r1.model.parallel import initialize
from megatron_r1.weight_sync.disk import DiskSync
from megatron_r1.weight_sync.fp8_weights import Fp8Weights
from megatron_r1.weight_sync.named_tensors import NamedTensors
from megatron_r1.weight_sync.shared_memory import SharedMemorySync
from megatron_r1.weight_sync.transport import preflight
from tests.convert.invented import FP8, same, tensors, tiny, write
from tests.train.test_collector_push import Pushing
from tests.train.test_rl_rollouts import config
from tests.weight_sync.test_shared_memory import ReadingEngine

SHAPE = {"hidden_size": 160, "intermediate_size": 300, "moe_intermediate_size": 136}
"""More than a block, and none a multiple of it."""
SCALES = ["float32", "ue8m0"]


def cast(source: Path, output: Path, **options: Any) -> Path:
    run_cast(CastConfig(source=source, output=output, dtype="fp8", **options))
    return output


@dataclass
class Trained:
    """A policy that has left the folder it began from, and what it is when it is saved."""

    model: BuiltModel
    base: Path
    saved: Path

    def tensors(self) -> NamedTensors:
        export = self.model.export(torch.bfloat16)
        return NamedTensors(iter(export), export.specs())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("trained")
    base = write(root / "base", tiny(**SHAPE))
    initialize(ParallelSection(), seed=0)
    model = build_model(ModelSection(path=base, dtype="bfloat16"), 64)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.mul_(1 + torch.randn_like(parameter) / 4)
    hf_folder.write(root / "saved", model.hf, model.export(torch.bfloat16))
    return Trained(model, base, root / "saved")


@pytest.fixture(scope="module", params=SCALES)
def served(request: pytest.FixtureRequest, trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What engines have started on: the base."""
    return cast(trained.base, tmp_path_factory.mktemp(request.param) / "fp8", scale_format=request.param)


@pytest.fixture(scope="module")
def expected(served: Path, trained: Trained) -> Mapping[str, torch.Tensor]:
    """The trained policy, saved and cast."""
    return tensors(cast(trained.saved, served.with_name("expected"), scale_format=served.parent.name[:-1]))


def test_in_memory_and_on_disk(
    trained: Trained, served: Path, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Also what a plan says, and that the folder with this config.json is a checkpoint of that policy."""
    engine, convert = ReadingEngine(), Fp8Weights(served, trained.base)
    disk = DiskSync(engine, tmp_path / "sync")
    for sync in (SharedMemorySync(engine, tmp_path), disk):
        sync.push(convert(trained.tensors()), version=1)
        assert same(engine.updates[-1][2], expected)
    assert not same(tensors(served), expected)
    shutil.copy(served / "config.json", disk.folder / "weights-1")
    assert dequantised(disk.folder / "weights-1") == dequantised(served.with_name("expected"))


def dequantised(folder: Path) -> dict[str, list[list[float]]]:
    reader = TensorReader(folder)
    return {name: reader[name].float().tolist() for name in reader}


def test_half_a_step_of_e4m3(trained: Trained, served: Path) -> None:
    """Each number is off by that at most, at its own size or at the low end of its block's."""
    sent, source = dict(Fp8Weights(served, trained.base)(trained.tensors())), tensors(trained.saved)
    quantised = [name for name, tensor in sent.items() if tensor.dtype == torch.float8_e4m3fn]
    assert len(quantised) > len(source) / 2
    for name in quantised:
        rows, columns = sent[name].shape
        scale = sent[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns].double()
        weight = source[name].double()
        bound = torch.maximum(weight.abs() / 16, scale / 1024) * (1 + 2.0**-19)
        assert ((sent[name].double() * scale - weight).abs() <= bound).all(), name


def test_what_comes_is_what_was_said(trained: Trained, served: Path, tmp_path: Path) -> None:
    """Names, dtypes, shapes and their order, on which NCCL relies; the bytes of a push are about half."""
    sent = Fp8Weights(served, trained.base)(trained.tensors())
    said = [(name, spec.dtype, spec.shape) for name, spec in sent.specs.items()]
    assert said == [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in sent]
    sync, stored = DiskSync(ReadingEngine(), tmp_path), Fp8Weights(served, trained.base)
    plan = preflight(lambda few: sync.push(few, -1), trained.model.export(torch.bfloat16), "disk", stored)
    assert plan.bytes == sum(tensor.nbytes for tensor in tensors(served).values())
    assert plan.bytes < 0.6 * trained.tensors().nbytes


def test_a_run_sends_what_its_engines_hold(trained: Trained, served: Path, expected: dict[str, torch.Tensor]) -> None:
    rollout = {"max_model_len": 64, "max_tokens": 32, "fp8_path": served}
    run = config(rollout=rollout, model={"path": trained.base, "dtype": "bfloat16"})
    assert run.rollout.served(trained.base) == served
    collector = Pushing(run)
    collector._stored = Fp8Weights(served, trained.base)
    collector.push(trained.model.export(torch.bfloat16), version=3)
    version, names = collector.sync.pushed[-1]
    assert (version, sorted(names)) == (3, sorted(expected))
    assert f"{len(expected):,} tensors, " in collector.said.messages[0]


def test_blocks_of_another_size(trained: Trained, tmp_path: Path) -> None:
    """A released checkpoint says its own; what is not in FP8 there is left as it is."""
    changed = {"o_proj", "down_proj"}
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors(trained.base).items():
        if name.split(".")[-2] in changed:
            stored[name] = torch.zeros(tensor.shape, dtype=torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = torch.ones(-(-tensor.shape[0] // 64), -(-tensor.shape[1] // 32))
        else:
            stored[name] = tensor
    hf = tiny(**SHAPE) | {"quantization_config": FP8 | {"weight_block_size": [64, 32]}}
    hf_folder.write(tmp_path / "fp8", hf, stored.items())
    sent, source = dict(Fp8Weights(tmp_path / "fp8", trained.base)(trained.tensors())), tensors(trained.saved)
    assert {name: (one.dtype, one.shape) for name, one in sent.items()} == {
        name: (one.dtype, one.shape) for name, one in stored.items()
    }
    name = "model.layers.0.mlp.down_proj.weight"
    block = source[name][64:128, 32:64].float()
    assert sent[f"{name}_scale_inv"][1, 1] == block.abs().max() / 448
    gate = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(sent[gate], source[gate])


def test_a_tensor_that_is_not_finite_is_named(trained: Trained, served: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    broken = NamedTensors.of({name: torch.full((160, 8), torch.nan)})
    with pytest.raises(DataError, match=f"{name} holds NaN"):
        list(Fp8Weights(served, trained.base)(broken))


@pytest.fixture
def copied(served: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(served, tmp_path / "copied"))


def test_folders_that_do_not_fit(trained: Trained, copied: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not in DeepSeek's FP8: `megatron-r1 cast .* --dtype=fp8`"):
        Fp8Weights(trained.saved, trained.base)
    file = copied / "config.json"
    hf = json.loads(file.read_text())
    file.write_text(json.dumps(hf | {"rope_theta": 7.0}))
    with pytest.raises(ConfigError, match=r"another model than .* has rope_theta = 7\.0"):
        Fp8Weights(copied, trained.base)
    file.write_text(json.dumps({name: value for name, value in hf.items() if name != "quantization_config"}))
    with pytest.raises(ConfigError, match=r"is not in DeepSeek's FP8"):
        Fp8Weights(copied, trained.base)


def test_engines_in_fp8_compute_in_bfloat16() -> None:
    rollout = {"max_model_len": 64, "max_tokens": 32, "fp8_path": "fp8"}
    with pytest.raises(ConfigError, match=r'rollout\.fp8_path: .* but model\.dtype = "float32"'):
        config(rollout=rollout, model={"path": "model", "dtype": "float32"})
