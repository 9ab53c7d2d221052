"""Layers with the tensors of DeepSeek-V3 at their true size are converted in less memory than they take."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_r1.model.fp8 import SCALE_SUFFIX
from megatron_r1.model.safetensors_file import read_header
from tests.convert.invented import V3
from tools import header_checkpoint

GIB = 2**30
CONVERT = """
import json, sys
from megatron_r1.config.convert import CastConfig, ExportConfig, ImportConfig
from megatron_r1.convert import verbs

options = json.loads(sys.argv[2])
kind = {"import": ImportConfig, "export": ExportConfig, "cast": CastConfig}[sys.argv[1]]
print(json.dumps(getattr(verbs, "run_" + sys.argv[1])(kind(**options))))
"""


def convert(verb: str, **options: Any) -> dict[str, Any]:
    """In a process of its own, whose memory is then that of the conversion."""
    text = json.dumps(options, default=str)
    done = subprocess.run([sys.executable, "-c", CONVERT, verb, text], stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def write_holes(folder: Path, hf: dict[str, Any]) -> None:
    """A sparse checkpoint: weights of zeros that stand on no disk, scales of 1."""
    header_checkpoint.make(hf, folder, filled=False)
    for path in folder.glob("*.safetensors"):
        with path.open("r+b") as file:
            for entry in read_header(path).values():
                if entry.name.endswith(SCALE_SUFFIX):
                    file.seek(entry.offset)
                    file.write(torch.ones(entry.shape).numpy())


@pytest.mark.timeout(900)
def test_memory_is_bounded(tmp_path: Path) -> None:
    hf = json.loads(V3.read_text())
    hf |= {"num_hidden_layers": 2, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0, "vocab_size": 2048}
    hf |= {"n_routed_experts": 16, "n_group": 8, "topk_group": 4}
    write_holes(tmp_path / "hf", hf)
    # So many workers would hold most of it at once if they held tensors.
    figures = convert("import", source=tmp_path / "hf", output=tmp_path / "megatron", workers=16)
    assert figures["largest_tensor"] == 2 * 18432 * 7168
    bound = 2 * GIB  # no tensor is joined or cut, so none is ever held whole
    assert figures["bytes_written"] > bound  # a converter that holds the model would not pass
    assert figures["peak_memory"] <= bound
    assert figures["peak_memory"] <= figures["memory"] <= bound  # as predicted
