"""`reward-model`: a rule learned from pairs and from labels, on held-out rows; the folder; and a killed run."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from megatron_r1.config.dpo import DPOConfig
from megatron_r1.config.load import load
from megatron_r1.config.reward_model import RewardModelConfig
from megatron_r1.config.sections import PolicySection
from megatron_r1.data.preferences import read_pairs
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError
from megatron_r1.loss.pairwise import Pairwise
from megatron_r1.model.build import build_model
from megatron_r1.train.preference_batch import batch
from megatron_r1.train.preference_loop import share_of
from megatron_r1.train.reward_model import Texts, read, run
from megatron_r1.train.scorer import Scorer
from tests.train.preference_runs import (
    WARNS,
    bad_batches,
    equal_when_killed,
    responses,
    settings,
    throughput,
    write_labels,
    write_pairs,
    write_tokenizer,
)

EXAMPLES = Path(__file__).parents[2] / "examples/preferences"


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path
) -> tuple[RewardModelConfig, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("pairwise")
    data = write_pairs(folder / "pairs.jsonl", 320)
    config = RewardModelConfig.model_validate(settings(folder, tokenizer_folder, data, part="response", guard=WARNS))
    return config, run(config)


def test_a_rule_is_learned_on_heldout_pairs(trained: tuple[RewardModelConfig, dict[str, Any]]) -> None:
    _, summary = trained
    assert summary["rows_heldout"] == 64
    assert summary["heldout_accuracy_base"] < 0.75
    assert summary["heldout_accuracy_final"] > 0.95
    assert summary["heldout_margin_final"] > 3 > summary["heldout_margin_base"]
    kinds = ("chosen_longer", "chosen_shorter")
    assert all(summary[f"heldout_accuracy/{kind}_final"] > 0.9 for kind in kinds), "it is not only length"
    assert sum(summary[f"heldout_rows/{kind}"] for kind in (*kinds, "same_length")) == 64


def test_transformers_scores_as_the_run_measured(trained: tuple[RewardModelConfig, dict[str, Any]]) -> None:
    """The exported folder on the held-out rows: same mean, spread and margin as in the summary."""
    config, summary = trained
    folder = config.output / "hf"
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    heldout = read(config, Tokenizer.load(folder)).heldout
    with torch.no_grad():
        scores = [model(torch.tensor([text.tokens])).logits[0, 0] for item in heldout for text in item.texts]
    chosen, rejected = torch.stack(scores).view(-1, 2).unbind(1)
    assert (chosen - rejected).mean().item() == pytest.approx(summary["heldout_margin_final"], abs=1e-4)
    assert torch.stack(scores).mean().item() == pytest.approx(summary["score_mean"], abs=1e-4)
    assert torch.stack(scores).std(unbiased=False).item() == pytest.approx(summary["score_std"], abs=1e-4)
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] == 3


def test_a_killed_run_goes_on_bit_for_bit(trained: tuple[RewardModelConfig, dict[str, Any]]) -> None:
    equal_when_killed(run, trained[0], trained[0].output)


def test_bad_batches_are_kept_with_the_score_of_each_text(trained: tuple[RewardModelConfig, dict[str, Any]]) -> None:
    kept = bad_batches(trained[0].output)
    assert kept
    for micro in kept:
        assert micro["loss"].numel() == len(micro["samples"])
        assert micro["loss"].isfinite().all()
    assert all(min(figures) > 0 for figures in throughput(trained[0].output))


def test_an_exported_reward_model_is_trained_on(
    trained: tuple[RewardModelConfig, dict[str, Any]], tmp_path: Path, tokenizer_folder: Path
) -> None:
    config, first = trained
    data = write_pairs(tmp_path / "pairs.jsonl", 64, seed=1)
    values = settings(tmp_path, tokenizer_folder, data, part="response")
    values["model"] = {"path": config.output / "hf", "dtype": "float32"}
    summary = run(RewardModelConfig.model_validate(values))
    assert summary["heldout_accuracy_base"] > 0.9
    assert first["heldout_accuracy_base"] < 0.75


def test_labels_are_learned_pointwise(tmp_path: Path, tokenizer_folder: Path) -> None:
    data = write_labels(tmp_path / "labels.jsonl", 320)
    values = settings(tmp_path, tokenizer_folder, data, part="response", kind="pointwise", epochs=3)
    summary = run(RewardModelConfig.model_validate(values))
    assert summary["heldout_accuracy_final"] > 0.95
    assert summary["heldout_rows/safe"] + summary["heldout_rows/unsafe"] == 64


def test_adapters_learn_and_are_exported_merged(tmp_path: Path, tokenizer_folder: Path) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", 160)
    values = settings(tmp_path, tokenizer_folder, data, part="response", optim={"lr": 1e-2}, batch=16)
    values["model"]["lora"] = {"rank": 4}
    config = RewardModelConfig.model_validate(values)
    summary = run(config)
    assert summary["heldout_loss_final"] < summary["heldout_loss_base"]
    again = build_model(PolicySection(path=config.output / "hf", dtype="float32"), 64)
    scorer, loss = Scorer(again, config.optim, 1), Pairwise()
    heldout = read(config, Tokenizer.load(tokenizer_folder)).heldout
    figures = scorer.evaluate(batch(heldout, loss, share_of(scorer, config)), loss)
    assert figures["loss"] == pytest.approx(summary["heldout_loss_final"], abs=1e-5)


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


@pytest.mark.parametrize(
    ("prompt", "part", "read"),
    [
        ("User: 1? Assistant:", "summary", "5"),
        ("User: 1? Assistant:", "response", "<think>a</think> 5"),
        ("User: 1? Assistant:<think>\n", "summary", "5"),
    ],
)
def test_tokens_are_prompt_part_and_end(tokenizer: Tokenizer, prompt: str, part: Any, read: str) -> None:
    response = " <think>a</think> 5" if "<think>" not in prompt else "a</think> 5"
    text = Texts(tokenizer, part).scored(prompt, response)
    assert text is not None
    assert text.tokens == [*tokenizer.encode_prompt(prompt), *tokenizer.encode(read), tokenizer.eos_id]
    assert text.judged == 1


def test_a_response_without_summary_is_not_scored(tokenizer: Tokenizer) -> None:
    assert Texts(tokenizer, "summary").scored("User: 1? Assistant:<think>\n", "a, b, c") is None
    assert Texts(tokenizer, "summary").scored("User: 1? Assistant:", " <think>a, b") is None


def test_what_is_left_out_is_counted(tmp_path: Path, tokenizer_folder: Path) -> None:
    good, bad = responses(random.Random(0))
    chosen = ["<think>a</think> 5", good, good * 20]
    rejected = ["<think>b</think> 5", bad, bad]
    rows = [
        {"prompt": f"User: {n}?", "chosen": c, "rejected": r}
        for n, (c, r) in enumerate(zip(chosen, rejected, strict=True))
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = settings(tmp_path, tokenizer_folder, data, heldout_share=0.0)
    counts = read(RewardModelConfig.model_validate(values), Tokenizer.load(tokenizer_folder)).counts
    assert counts == {"training": 1, "heldout": 0, "unusable": 1, "too_long": 1}
    data.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(DataError, match="no row is left to train on"):
        run(RewardModelConfig.model_validate(values))


def test_the_examples_fit_their_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES.parents[1])
    reward_model = load(EXAMPLES / "reward_model.toml", [], RewardModelConfig)
    dpo = load(EXAMPLES / "dpo.toml", [], DPOConfig)
    assert len(read_pairs(reward_model.data)) == len(read_pairs(dpo.data)) == 320


def test_defaults_are_those_of_the_paper() -> None:
    fields = RewardModelConfig.model_fields
    assert (fields["batch"].default, fields["optim"].default.lr) == (256, 6e-6)
    assert (fields["epochs"].default, fields["max_length"].default) == (1, 8192)
