"""The whole of DeepSeek-V3 is planned from headers alone; its totals by a formula of their own, not from the rules."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from megatron_r1.config.convert import ImportConfig
from megatron_r1.config.inspect import InspectConfig
from megatron_r1.convert import inspect
from megatron_r1.convert.verbs import run_import
from tests.convert.invented import V3
from tools import header_checkpoint

FP8_MATRICES = {
    "attention": [(1536, 7168), (24576, 1536), (576, 7168), (32768, 512), (7168, 16384)],
    "dense": [(18432, 7168), (18432, 7168), (7168, 18432)],
    "expert": [(2048, 7168), (2048, 7168), (7168, 2048)],
}
EMBEDDING = 129280 * 7168
TENSORS, BYTES = 91_991, 688_574_839_360
"""What the headers of the released checkpoint add up to."""


def fp8(kind: str) -> tuple[int, int]:
    """Tensors and bytes of FP8 matrices with their float32 scales."""
    sizes = [rows * columns + 4 * -(-rows // 128) * -(-columns // 128) for rows, columns in FP8_MATRICES[kind]]
    return 2 * len(sizes), sum(sizes)


def weights(kind: str) -> int:
    return sum(rows * columns for rows, columns in FP8_MATRICES[kind])


def totals() -> tuple[int, int]:
    """Tensors and bytes of 3 dense layers, 58 of experts, the MTP layer, embeddings, head and last norm."""
    norms = 7168 + 7168 + 1536 + 512
    attention = (fp8("attention")[0] + 4, fp8("attention")[1] + 2 * norms)
    router = (2, 2 * 256 * 7168 + 4 * 256)
    experts = tuple(257 * value for value in fp8("expert"))
    mtp = (6, 2 * (2 * EMBEDDING + 3 * 7168 + 7168 * 14336))
    ends = (3, 2 * (2 * EMBEDDING + 7168))
    count, size = (
        62 * attention[i] + 3 * fp8("dense")[i] + 59 * (router[i] + experts[i]) + mtp[i] + ends[i] for i in (0, 1)
    )
    return count, size


def bfloat16_bytes() -> int:
    """The same model in bfloat16, each tensor once, the routing bias in float32."""
    norms = 62 * (7168 + 7168 + 1536 + 512) + 4 * 7168
    matrices = 62 * weights("attention") + 3 * weights("dense") + 59 * (257 * weights("expert") + 256 * 7168)
    return 2 * (norms + matrices + 2 * EMBEDDING + 7168 * 14336) + 4 * 59 * 256


@pytest.mark.timeout(600)
def test_the_whole_of_deepseek_v3_is_planned_from_headers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert totals() == (TENSORS, BYTES)
    folder = tmp_path / "v3"
    assert header_checkpoint.make(json.loads(V3.read_text()), folder, filled=False) == (TENSORS, BYTES)
    files = [*folder.iterdir()]
    assert sum(file.stat().st_size for file in files) > BYTES
    assert sum(512 * file.stat().st_blocks for file in files) < 100e6  # holes
    figures = run_import(ImportConfig(source=folder, output=tmp_path / "megatron", workers=8, dry_run=True))
    assert (figures["tensors_read"], figures["bytes_read"]) == (TENSORS, BYTES)
    assert bfloat16_bytes() < figures["bytes_written"] < 1.001 * bfloat16_bytes()
    assert figures["largest_tensor"] == 2 * EMBEDDING
    assert figures["memory"] <= 2 * 2**30
    printed = capsys.readouterr().out
    assert "91,991 tensors, 688,574,839,360 bytes" in printed
    assert "disk     1,365.36 GB needed" in printed
    assert "time     about" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["v3"]


@pytest.mark.timeout(600)
def test_deepseek_v3_has_its_published_size(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(V3.read_text())
    result = inspect.inspect(InspectConfig(path=tmp_path))
    assert result["format"] == "config only"
    assert result["passed"]
    assert result["parameters"] == {
        "main": 671_026_419_200,
        "activated": 37_552_282_624,
        "mtp": 11_610_068_224,
        "total": 671_026_419_200 + 11_610_068_224,
    }
    assert result["max_context"] == 163_840
    text = io.StringIO()
    inspect.show(result, Console(file=text))
    assert "671,026,419,200" in text.getvalue()
