"""A trained checkpoint, quantised and trained on: accuracy and loss before and after, computed from what was written.

The written numbers are read by what the formats are and run in plain torch, so that modelopt's own simulation of them
is not asked about itself.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from megatron_r1.convert.modelopt_finetune import mean_loss
from megatron_r1.errors import ConfigError
from megatron_r1.model.safetensors_file import read, read_header
from tests.convert.invented import write
from tests.convert.quantized import IDS, accuracy, installed, quantize, served, train, write_tokenizer

OUTLIER = 2.0**17


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("trained"))


@installed
def test_fp8_loses_next_to_nothing(trained: Path) -> None:
    output, figures = quantize(trained, "fp8", "fp8")
    source = AutoModelForCausalLM.from_pretrained(trained / "hf", dtype=torch.float32)
    model = served(trained, output)
    assert (accuracy(source), accuracy(model)) == (1, 1)
    before, after = mean_loss(source, IDS), mean_loss(model, IDS)
    assert 0 < abs(after - before) < 0.05
    assert figures["heldout_loss_source"] == pytest.approx(before, abs=0.01)
    assert figures["heldout_loss_quantised"] == pytest.approx(after, abs=0.01)


@pytest.fixture
def hostile(trained: Path, tmp_path: Path) -> Path:
    """The same function of its input, exactly, in numbers that one scale a tensor cannot hold: the unit of each MLP
    that does nothing has weights so large that the others fall below e4m3's normal numbers."""
    model = LlamaForCausalLM.from_pretrained(trained / "hf", dtype=torch.bfloat16)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[:, 0] = OUTLIER
    assert accuracy(model.float()) == 1
    model.bfloat16().save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf")
    (tmp_path / "text.jsonl").write_bytes((trained / "text.jsonl").read_bytes())
    return tmp_path


@installed
def test_training_brings_back_what_rounding_loses(hostile: Path) -> None:
    _, without = quantize(hostile, "plain", "fp8")
    text = hostile / "text.jsonl"
    options = {"finetune": text, "finetune_steps": 60, "finetune_batch": 50, "finetune_lr": 1e-3}
    output, figures = quantize(hostile, "tuned", "fp8", **options)
    before, lost, after = (figures[f"heldout_loss_{name}"] for name in ("source", "quantised", "finetuned"))
    assert lost == pytest.approx(without["heldout_loss_quantised"], abs=0.02)
    assert lost - before > 0.05
    assert after - before < 0.5 * (lost - before)
    assert figures["finetune_loss_last"] < figures["finetune_loss_first"]
    losses = [mean_loss(served(hostile, hostile / name), IDS) for name in ("plain", "tuned")]
    assert losses == [pytest.approx(lost, abs=0.03), pytest.approx(after, abs=0.03)]
    assert accuracy(served(hostile, output)) == 1


@installed
def test_mixture_of_experts(trained: Path, tmp_path: Path) -> None:
    """Each expert is trained, and the MTP layer, which transformers drops, stays."""
    write(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf")
    options = {"source": tmp_path / "hf", "output": tmp_path / "out", "finetune": trained / "text.jsonl"}
    quantize(trained, "v3", "fp8", **options, finetune_steps=1, finetune_batch=50, finetune_lr=1e-2)
    plain = tmp_path / "plain"
    quantize(trained, "v3", "fp8", source=tmp_path / "hf", output=plain)
    one, other, source = (
        {name: read(entry) for name, entry in read_header(folder / "model.safetensors").items()}
        for folder in (tmp_path / "out", plain, tmp_path / "hf")
    )
    assert one.keys() == other.keys()
    moved = {name for name in one if not torch.equal(one[name].float(), other[name].float())}
    experts = {name for name in one if ".experts." in name and "layers.3." not in name and name.endswith("weight")}
    assert len(experts & moved) >= len(experts) / 2  # random routers send all texts to half of the groups
    assert all(torch.equal(one[name], source[name].bfloat16()) for name in one if name.startswith("model.layers.3."))


@installed
def test_text_that_is_too_short(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "short.jsonl"
    file.write_text('{"text": "7"}\n')
    with pytest.raises(ConfigError, match=r"short.jsonl holds no text of 2 tokens"):
        quantize(trained, "short", "fp8", finetune=file, length=1)
