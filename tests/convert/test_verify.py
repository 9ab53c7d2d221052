"""verify, against hashes worked by hand, single bits that were turned, and transformers' own logits."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_r1.config.convert import CastConfig, ImportConfig
from megatron_r1.config.inspect import VerifyConfig
from megatron_r1.convert import verify as verb
from megatron_r1.convert.verbs import run_cast, run_import
from megatron_r1.errors import DataError
from tests.convert.invented import tiny, write
from tests.model.dense_models import write_dense

FILE = "model.safetensors"
NORM = "model.norm.weight"
WORDS = [f"w{number:03}" for number in range(120)]


def verify(a: Path, b: Path, **options: Any) -> dict[str, Any]:
    result = verb.verify(VerifyConfig(a=a, b=b, workers=2, **options))
    json.dumps(result, allow_nan=False)
    return result


def shown(result: dict[str, Any]) -> str:
    text = io.StringIO()
    verb.show(result, Console(file=text))
    return text.getvalue()


def altered(source: Path, folder: Path, **changes: torch.Tensor | None) -> Path:
    """A copy of a folder with other tensors; None = without it."""
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(source / FILE) | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / FILE)
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    write_dense(tmp_path / "a", "llama")
    return tmp_path / "a"


def test_the_hash_is_what_anyone_can_compute(llama: Path) -> None:
    lines = []
    for name, value in sorted(load_file(llama / FILE).items()):
        content = hashlib.sha256(f"float32 {list(value.shape)}\n".encode() + value.numpy().tobytes())
        lines.append(f"{content.hexdigest()}  {name}\n")
    result = verify(llama, llama)
    assert result["a"]["sha256"] == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert result["b"] == result["a"]
    assert result["identical"]
    assert result["passed"]
    assert result["equal"] == len(lines)
    assert result["a"]["sha256"] in shown(result)
    assert "\nidentical" in shown(result)


def test_files_and_their_order_do_not_matter(llama: Path, tmp_path: Path) -> None:
    other = tmp_path / "b"
    other.mkdir()
    (other / "config.json").write_text((llama / "config.json").read_text())
    names = sorted(load_file(llama / FILE), reverse=True)
    for number in range(2):
        save_file({name: load_file(llama / FILE)[name] for name in names[number::2]}, other / f"{number}.safetensors")
    assert verify(llama, other)["identical"]
    assert verify(llama, other, stored=True)["identical"]


def test_one_bit_is_found(llama: Path, tmp_path: Path) -> None:
    value = load_file(llama / FILE)[NORM]
    value.view(torch.int32)[5] ^= 1
    result = verify(llama, altered(llama, tmp_path / "b", **{NORM: value}))
    assert [one["name"] for one in result["differing"]] == [NORM]
    expected = (value - load_file(llama / FILE)[NORM]).abs().max().item()
    assert result["differing"][0]["max_difference"] == expected > 0
    assert result["a"]["sha256"] != result["b"]["sha256"]
    assert not result["identical"]
    assert not result["close"]
    assert not result["passed"]
    assert f"differs: {NORM}" in shown(result)


def test_a_difference_in_numbers(llama: Path, tmp_path: Path) -> None:
    value = load_file(llama / FILE)[NORM]
    moved = value.clone()
    moved[3] += 0.25
    (one,) = verify(llama, altered(llama, tmp_path / "b", **{NORM: moved}))["differing"]
    assert one["max_difference"] == pytest.approx(0.25)
    assert one["relative_error"] == pytest.approx(0.25 / value.norm().item())


@pytest.mark.parametrize(
    ("change", "close"), [("negative zero", True), ("dtype", True), ("nan", False), ("shape", False)]
)
def test_other_bits(change: str, close: bool, llama: Path, tmp_path: Path) -> None:
    value = load_file(llama / FILE)[NORM].bfloat16().float()
    value[0] = 0.0
    first = altered(llama, tmp_path / "a0", **{NORM: value})
    other = value.clone()
    if change == "negative zero":
        other[0] = -0.0
    elif change == "nan":
        other[0] = float("nan")
    other = {"dtype": other.bfloat16(), "shape": other[:-1].clone()}.get(change, other)
    result = verify(first, altered(first, tmp_path / "b", **{NORM: other}), stored=True)
    assert not result["identical"]
    assert result["close"] is close
    assert [one["name"] for one in result["differing"]] == [NORM]
    assert shown(result)


def test_nan_in_both_is_equal(llama: Path, tmp_path: Path) -> None:
    value = load_file(llama / FILE)[NORM]
    value[0] = float("nan")
    first, second = (altered(llama, tmp_path / name, **{NORM: value}) for name in ("x", "y"))
    assert verify(first, second)["identical"]


def test_what_only_one_has(llama: Path, tmp_path: Path) -> None:
    other = altered(llama, tmp_path / "b", **{NORM: None, "extra.weight": torch.ones(2)})
    result = verify(llama, other, tolerance=0.5)
    assert result["only_in_a"] == [NORM]
    assert result["problems"] == [f"{other}: {NORM} is missing", f"{other}: extra.weight is known to no rule"]
    assert not result["passed"]
    assert not result["close"]
    stored = verify(llama, other, stored=True)
    assert (stored["only_in_a"], stored["only_in_b"]) == ([NORM], ["extra.weight"])
    assert not stored["identical"]


def test_configs_are_compared(llama: Path, tmp_path: Path) -> None:
    other = altered(llama, tmp_path / "b")
    config = json.loads((llama / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    result = verify(llama, other)
    assert result["config_differences"] == {"rms_norm_eps": [config["rms_norm_eps"], 0.5]}
    assert "rms_norm_eps" in shown(result)


def test_fp8_is_close_to_what_it_was_made_from(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", tiny(hidden_size=128))
    run_cast(CastConfig(source=plain, output=tmp_path / "fp8", dtype="fp8", workers=1))
    exact, near = verify(plain, tmp_path / "fp8"), verify(plain, tmp_path / "fp8", tolerance=0.04)
    assert not exact["passed"]
    assert near["passed"]
    assert near["close"]
    assert not near["identical"]
    assert 0.01 < max(one["relative_error"] for one in near["differing"]) < 0.04
    assert not verify(plain, tmp_path / "fp8", tolerance=0.001)["passed"]
    run_cast(CastConfig(source=tmp_path / "fp8", output=tmp_path / "back", dtype="bfloat16", workers=1))
    assert verify(tmp_path / "fp8", tmp_path / "back")["identical"]
    assert not verify(tmp_path / "fp8", tmp_path / "back", stored=True)["identical"]


def test_a_megatron_checkpoint_against_its_source(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf")
    run_import(ImportConfig(source=folder, output=tmp_path / "megatron", workers=1))
    result = verify(folder, tmp_path / "megatron", output=tmp_path / "out")
    assert result["identical"]
    assert json.loads((tmp_path / "out/summary.json").read_text())["a"]["sha256"] == result["b"]["sha256"]


def test_without_mtp_layers(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf")
    run_cast(CastConfig(source=folder, output=tmp_path / "without", mtp=False, workers=1))
    assert verify(folder, tmp_path / "without")["only_in_a"]
    assert verify(folder, tmp_path / "without", mtp=False)["identical"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(WORDS[(number * 37 + number // 7) % 120] for number in range(90)))
    return file


def with_tokenizer(folder: Path) -> Path:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="w000"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w002", bos_token="w001").save_pretrained(folder)
    return folder


def test_logits_are_those_of_transformers(tmp_path: Path, text: Path) -> None:
    first, second = (write_dense(tmp_path / f"{seed}", "qwen3", seed) for seed in (1, 2))
    found = verify(with_tokenizer(tmp_path / "1"), tmp_path / "2", text=text, text_tokens=80, text_length=32)["text"]
    ids = torch.tensor([int(word[1:]) for word in text.read_text().split()[:80]])
    with torch.no_grad():
        pieces = [[model(piece[None]).logits[0] for piece in ids.split(32)] for model in (first, second)]
    ours, theirs = (torch.cat(logits) for logits in pieces)
    divergence = F.kl_div(theirs.log_softmax(1), ours.log_softmax(1), reduction="none", log_target=True).sum(1)
    assert found["tokens"] == 80
    assert found["max_difference"] == pytest.approx((ours - theirs).abs().max().item(), abs=1e-3)
    assert found["kl_mean"] == pytest.approx(divergence.mean().item(), rel=1e-3)
    assert found["kl_max"] == pytest.approx(divergence.max().item(), rel=1e-3)
    assert found["top1_agreement"] == pytest.approx((ours.argmax(1) == theirs.argmax(1)).double().mean().item())
    for name, logits in zip(("loss_a", "loss_b"), pieces, strict=True):
        losses = [F.cross_entropy(x[:-1], y[1:], reduction="none") for x, y in zip(logits, ids.split(32), strict=True)]
        assert found[name] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)


def test_logits_of_another_format_are_bitwise_the_same(tmp_path: Path, text: Path) -> None:
    folder = with_tokenizer(write(tmp_path / "hf", tiny(vocab_size=120)))
    run_import(ImportConfig(source=folder, output=tmp_path / "megatron", workers=1))
    result = verify(folder, tmp_path / "megatron", text=text, text_length=64)
    found = result["text"]
    assert (found["max_difference"], found["kl_max"], found["top1_agreement"]) == (0.0, 0.0, 1.0)
    assert found["loss_a"] == found["loss_b"]
    assert "KL(a || b)          0 nats, at most 0" in shown(result)


def test_other_models_are_told_in_few_lines(llama: Path, tmp_path: Path) -> None:
    result = verify(llama, write(tmp_path / "v3"))
    alone = len(result["only_in_a"]) + len(result["only_in_b"])
    text = shown(result)
    assert f", {alone:,} in one of them only" in text
    assert len(text.splitlines()) < 60


def test_text_that_cannot_be_used(llama: Path, tmp_path: Path, text: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        verify(llama, llama, text=text)
    with_tokenizer(llama)
    text.write_text("")
    with pytest.raises(DataError, match="no text"):
        verify(llama, llama, text=text)
    with pytest.raises(DataError, match="cannot read"):
        verify(llama, llama, text=tmp_path / "gone")
