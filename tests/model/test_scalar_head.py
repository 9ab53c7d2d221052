"""The scalar head against transformers' `ForSequenceClassification`, alone, packed, and through a folder and back."""

import json
from pathlib import Path

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from megatron_r1.config.sections import ParallelSection
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.model import hf_folder
from megatron_r1.model.build import BuiltModel, build_model
from megatron_r1.model.mapping import weights
from megatron_r1.model.parallel import initialize
from megatron_r1.model.scalar_head import as_classifier
from tests.model.conftest import MODEL, section
from tests.model.dense_models import write_dense

LENGTHS = (17, 30, 9)


@pytest.fixture(scope="module")
def scalar(exported: Path) -> BuiltModel:
    """A scalar model on a causal model's trunk, its head large enough for scores to differ."""
    model = build_model(section(exported, load_weights=True, balance_loss_coef=0.0), 128, head="scalar")
    with torch.no_grad():
        model.module.output_layer.weight.normal_(generator=torch.Generator().manual_seed(3))
    model.module.eval()
    return model


@pytest.fixture(scope="module")
def classifier(scalar: BuiltModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier") / "hf"
    hf_folder.write(folder, scalar.hf, scalar.export(torch.float32), MODEL)
    return folder


@pytest.fixture(scope="module")
def texts(scalar: BuiltModel) -> list[torch.Tensor]:
    """Token ids above the special ones, each text ending in the end-of-sequence token."""
    generator = torch.Generator().manual_seed(1)
    eos = torch.tensor([scalar.hf["eos_token_id"]])
    return [torch.cat([torch.randint(4, 400, (n - 1,), generator=generator), eos]) for n in LENGTHS]


@torch.no_grad()
def values(model: BuiltModel, text: torch.Tensor) -> torch.Tensor:
    return model.module(text[None], torch.arange(len(text))[None], None)[0]


def test_scores_equal_transformers_at_the_last_token(
    scalar: BuiltModel, classifier: Path, texts: list[torch.Tensor]
) -> None:
    theirs = AutoModelForSequenceClassification.from_pretrained(classifier, dtype=torch.float32)
    assert type(theirs).__name__ == "DeepseekV3ForSequenceClassification"
    assert theirs.num_labels == 1
    with torch.no_grad():
        expected = torch.stack([theirs(text[None]).logits[0, 0] for text in texts])
        theirs.config.pad_token_id = 3
        padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=3)
        batched = theirs(padded, attention_mask=(padded != 3).long()).logits[:, 0]
    ours = torch.stack([values(scalar, text)[-1] for text in texts])
    assert ours.std() > 0.1, "scores too alike to tell models apart"
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours, batched, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "qwen2_tied", "qwen3_tied"])
def test_dense_families_too(name: str, tmp_path: Path) -> None:
    """A new head on the trunk that transformers wrote, tied or not, and transformers' score of what is exported."""
    initialize(ParallelSection(), seed=0)
    write_dense(tmp_path / "causal", name)
    model = build_model(section(tmp_path / "causal", load_weights=True), 128, head="scalar")
    hf_folder.write(tmp_path / "hf", model.hf, model.export(torch.float32))
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert type(theirs).__name__.endswith("ForSequenceClassification")
    text = torch.randint(4, 120, (20,), generator=torch.Generator().manual_seed(1))
    model.module.eval()
    with torch.no_grad():
        expected = theirs(text[None]).logits[0, 0]
    torch.testing.assert_close(values(model, text)[-1], expected, atol=1e-5, rtol=1e-5)
    assert build_model(section(tmp_path / "hf", load_weights=True), 128).hf == model.hf


def test_a_tied_model_may_hold_its_vocabulary_twice(tmp_path: Path) -> None:
    """Some checkpoints store `lm_head.weight` although it is the embedding."""
    initialize(ParallelSection(), seed=0)
    write_dense(tmp_path / "causal", "qwen2_tied")
    file = tmp_path / "causal/model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    model = build_model(section(tmp_path / "causal", load_weights=True), 128, head="scalar")
    exported = dict(model.export(torch.float32))
    assert "lm_head.weight" not in exported
    assert torch.equal(exported["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])


def test_packed_sequences_have_the_values_they_have_alone(scalar: BuiltModel, texts: list[torch.Tensor]) -> None:
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    packing = PackedSeqParams("thd", ends, ends, max_seqlen_q=max(LENGTHS), max_seqlen_kv=max(LENGTHS))
    packed = torch.cat(texts)[None]
    with torch.no_grad():
        together = scalar.module(packed, torch.arange(packed.numel())[None], None, packed_seq_params=packing)
    assert together.shape == packed.shape
    assert together.dtype == torch.float32
    torch.testing.assert_close(together[0], torch.cat([values(scalar, text) for text in texts]), atol=1e-5, rtol=0)


def test_the_folder_holds_a_classifier_without_vocabulary_and_mtp(scalar: BuiltModel, classifier: Path) -> None:
    config = json.loads((classifier / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForSequenceClassification"]
    assert (config["num_labels"], config["num_nextn_predict_layers"]) == (1, 0)
    tensors = load_file(classifier / "model.safetensors")
    assert tensors["score.weight"].shape == (1, scalar.hf["hidden_size"])
    assert not [name for name in tensors if "lm_head" in name or f"layers.{scalar.hf['num_hidden_layers']}." in name]


def test_a_classifier_is_built_from_its_folder(scalar: BuiltModel, classifier: Path, texts: list[torch.Tensor]) -> None:
    again = build_model(section(classifier, load_weights=True), 128)
    assert again.hf == scalar.hf
    for name, tensor in weights(scalar.module).items():
        assert torch.equal(tensor, weights(again.module)[name]), name
    again.module.eval()
    assert torch.equal(values(again, texts[0]), values(scalar, texts[0]))


def test_the_trunk_is_the_causal_models(built: BuiltModel, scalar: BuiltModel) -> None:
    trunk, causal = weights(scalar.module), weights(built.module)
    head = trunk.pop("output_layer.weight")
    assert head.shape == (1, scalar.hf["hidden_size"])
    assert len(trunk) > 20
    assert all(torch.equal(tensor, causal[name]) for name, tensor in trunk.items())


def test_values_are_float32_in_bfloat16(exported: Path, texts: list[torch.Tensor]) -> None:
    model = build_model(section(exported, load_weights=True, dtype="bfloat16"), 128, head="scalar")
    found = values(model, texts[0])
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())


@pytest.mark.parametrize(("pad", "kept"), [(2, False), (3, True), (None, False)])
def test_padding_that_is_the_end_token_is_not_named(pad: int | None, kept: bool) -> None:
    config = as_classifier({"architectures": ["LlamaForCausalLM"], "eos_token_id": [2, 5], "pad_token_id": pad})
    assert ("pad_token_id" in config and config["pad_token_id"] is not None) is kept
    assert config["architectures"] == ["LlamaForSequenceClassification"]


def test_a_reward_model_cannot_generate(classifier: Path) -> None:
    with pytest.raises(ConfigError, match="reward model"):
        build_model(section(classifier), 128, head="vocabulary")


def test_more_than_one_label_is_refused(model_folder) -> None:  # type: ignore[no-untyped-def]
    path = model_folder(architectures=["DeepseekV3ForSequenceClassification"], num_labels=3)
    with pytest.raises(DataError, match="3 labels"):
        build_model(section(path), 128)
