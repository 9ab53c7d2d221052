"""`dpo`: chosen responses rise over rejected ones on held-out pairs, the rest of the folder stays, a killed run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_r1.config.dpo import DPOConfig
from megatron_r1.config.load import validate
from megatron_r1.data.preferences import Pair
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError
from megatron_r1.train.dpo import as_item, read, run
from tests.train.preference_runs import (
    WARNS,
    bad_batches,
    equal_when_killed,
    settings,
    throughput,
    write_pairs,
    write_tokenizer,
)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> tuple[DPOConfig, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("dpo")
    data = write_pairs(folder / "pairs.jsonl", 320)
    config = DPOConfig.model_validate(settings(folder, tokenizer_folder, data, guard=WARNS))
    return config, run(config)


def test_chosen_rises_over_rejected_on_heldout_pairs(trained: tuple[DPOConfig, dict[str, Any]]) -> None:
    _, summary = trained
    assert summary["heldout_loss_base"] == pytest.approx(0.693147, abs=1e-4)
    assert summary["heldout_accuracy_base"] == pytest.approx(0.5)
    assert summary["heldout_loss_final"] < 0.6
    assert summary["heldout_accuracy_final"] > 0.9
    assert summary["heldout_margin_final"] > 0.5
    assert summary["heldout_chosen_reward_final"] > summary["heldout_rejected_reward_final"]


def test_transformers_finds_the_logps_that_the_run_measured(trained: tuple[DPOConfig, dict[str, Any]]) -> None:
    config, summary = trained
    model = AutoModelForCausalLM.from_pretrained(config.output / "hf", dtype=torch.float32)
    totals = []
    for item in read(config, Tokenizer.load(config.output / "hf")).heldout:
        for text in item.texts:
            with torch.no_grad():
                logprobs = model(torch.tensor([text.tokens])).logits[0].log_softmax(-1)
            totals.append(logprobs.gather(1, torch.tensor(text.labels)[:, None])[-text.judged :].sum())
    chosen, rejected = torch.stack(totals).view(-1, 2).mean(0).tolist()
    assert chosen == pytest.approx(summary["heldout_chosen_logp_final"], abs=1e-3)
    assert rejected == pytest.approx(summary["heldout_rejected_logp_final"], abs=1e-3)


def test_a_killed_run_goes_on_bit_for_bit(trained: tuple[DPOConfig, dict[str, Any]]) -> None:
    """The reference of the second process too: it is that of the starting weights, not of the checkpoint's."""
    equal_when_killed(run, trained[0], trained[0].output)


def test_bad_batches_are_kept_with_the_loss_of_each_token(trained: tuple[DPOConfig, dict[str, Any]]) -> None:
    kept = bad_batches(trained[0].output)
    assert kept
    for micro in kept:
        assert micro["loss"].shape == micro["selected"].shape
        assert (micro["loss"] > 0).all()
    assert all(min(figures) > 0 for figures in throughput(trained[0].output))


def test_a_whole_response_is_judged_with_its_end(tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer.load(tokenizer_folder)
    item = as_item(Pair("User: 1? Assistant:", " <think>a</think> 5", " 6"), tokenizer)
    assert item is not None
    prompt, answer = tokenizer.encode_prompt("User: 1? Assistant:"), tokenizer.encode(" 6")
    rejected = item.texts[1]
    assert rejected.tokens == prompt + answer
    assert rejected.labels[-rejected.judged :] == [*answer, tokenizer.eos_id]
    assert item.stratum == "chosen_longer"


def test_mtp_layers_are_not_trained_on_rejected_responses(tmp_path: Path) -> None:
    tree = settings(tmp_path, tmp_path, tmp_path)
    tree["model"] |= {"mtp_loss_coef": 0.3}
    with pytest.raises(ConfigError, match="mtp_loss_coef has to be 0"):
        validate(DPOConfig, tree, where="dpo.toml")
