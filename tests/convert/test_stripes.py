"""Tensors go through a conversion some rows at a time; the files are the same as if they had gone as a whole."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_r1.checkpoint.source import open_source
from megatron_r1.config.convert import CastConfig, ExportConfig, ImportConfig
from megatron_r1.convert.verbs import run_cast, run_export, run_import
from megatron_r1.errors import DataError
from megatron_r1.model.safetensors_file import Spec
from tests.convert.invented import FP8, contents, same, tensors, tiny, write
from tests.model.dense_models import write_dense

ROWS = {"vocab_size": 384, "intermediate_size": 300, "moe_intermediate_size": 160}
"""More than 128, and not all a multiple of it."""
NAMED = ("summary.json", "conversion.json", "README.md")
"""Files that name folders and times."""


@pytest.fixture
def stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As short as they can be: 128 rows."""
    monkeypatch.setattr("megatron_r1.model.safetensors_file.STRIPE_BYTES", 1)


def convert(source: Path, folder: Path) -> None:
    """There and back, into FP8 and out of it."""
    run_import(ImportConfig(source=source, output=folder / "megatron", dtype="bfloat16"))
    run_export(ExportConfig(source=folder / "megatron", output=folder / "back"))
    run_export(ExportConfig(source=folder / "megatron", output=folder / "fp8", dtype="fp8"))
    run_cast(CastConfig(source=folder / "fp8", output=folder / "wide", dtype="float32", max_shard_bytes=100_000))


def write_checkpoint(folder: Path, name: str) -> None:
    """Of a model that has what the name says."""
    if name == "joined and tied":
        write_dense(folder, "llama_tied")
    else:
        write(folder, tiny(**ROWS, **({"quantization_config": FP8} if name == "fp8" else {})))


@pytest.mark.parametrize("name", ["bfloat16", "fp8", "joined and tied"])
def test_the_same_files_whatever_the_stripes(tmp_path: Path, name: str, request: pytest.FixtureRequest) -> None:
    write_checkpoint(tmp_path / "hf", name)
    convert(tmp_path / "hf", tmp_path / "whole")
    request.getfixturevalue("stripes")
    convert(tmp_path / "hf", tmp_path / "striped")
    assert contents(tmp_path / "striped", *NAMED) == contents(tmp_path / "whole", *NAMED)
    if name == "bfloat16":
        assert same(tensors(tmp_path / "striped/back"), tensors(tmp_path / "hf"))


@pytest.mark.parametrize("name", ["bfloat16", "fp8"])
def test_stripes_are_short_and_make_up_the_tensor(tmp_path: Path, name: str, stripes: None) -> None:
    write_checkpoint(tmp_path / "hf", name)
    run_import(ImportConfig(source=tmp_path / "hf", output=tmp_path / "megatron"))
    for folder in ("hf", "megatron"):
        source = open_source(tmp_path / folder)
        found = [list(blocks) for rule in source.rules for blocks in source.stripes(rule)]
        read = [tensor for rule in source.rules for tensor in source.read(rule)]
        assert all(torch.equal(torch.cat(blocks), tensor) for blocks, tensor in zip(found, read, strict=True))
        assert max(map(len, found)) == 3
        assert {len(block) for blocks in found for block in blocks[:-1]} == {128}
        assert all(source.striped(rule) for rule in source.rules)


@pytest.mark.parametrize(("multiple", "due"), [(1, [0, 3, 6, 7]), (2, [0, 2, 4, 6, 7]), (4, [0, 4, 7]), (9, [0, 7])])
def test_rows_of_a_stripe(multiple: int, due: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_r1.model.safetensors_file.STRIPE_BYTES", 3 * 10)
    found = list(Spec(torch.bfloat16, (7, 5)).stripes(multiple))
    assert found == list(pairwise(due))
    assert list(Spec(torch.bfloat16, ()).stripes(multiple)) == [(0, 1)]
    assert list(Spec(torch.bfloat16, (0, 5)).stripes(multiple)) == [(0, 0)]


def test_a_number_that_is_none_is_told_with_its_rows(tmp_path: Path, stripes: None) -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    write_checkpoint(tmp_path / "hf", "bfloat16")
    stored = tensors(tmp_path / "hf")
    stored[name][200, 3] = torch.nan
    save_file(stored, tmp_path / "hf/model.safetensors")
    with pytest.raises(DataError, match=rf"{name} holds NaN or infinity between the rows 128 and 255"):
        run_cast(CastConfig(source=tmp_path / "hf", output=tmp_path / "fp8", dtype="fp8"))
    assert not (tmp_path / "fp8").exists()
