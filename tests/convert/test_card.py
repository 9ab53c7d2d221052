"""The model card, read back by the hub's own parser, and what it says of a recipe's records."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from megatron_r1.config.card import CardConfig
from megatron_r1.convert.card import Conversion, card, chat_template
from megatron_r1.errors import DataError
from megatron_r1.recipe.hashes import folder_hash

HF = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_hidden_layers": 61,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
RESULTS = {
    "model": "/home/someone/hf",
    "temperature": 0.6,
    "top_p": 0.95,
    "max_tokens": 32768,
    "tasks": {
        "aime": {
            "questions": 30,
            "pass@1": 0.798,
            "pass@1_error": 0.05,
            "pass@1_interval": [0.71, 0.87],
            "cons@64": 0.867,
            "cons@64_interval": [0.7, 0.95],
            "mean_tokens": 1234.5,
        }
    },
}


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def stage(folder: Path, verb: str, reads: dict[str, dict[str, str]], **config: Any) -> str:
    """A finished stage whose model is its own name. Returns the hash of its folder hf."""
    (folder / "hf").mkdir(parents=True)
    (folder / "hf/config.json").write_text(json.dumps(HF))
    outputs = {f"hf/{name}": sha(folder.name + name) for name in ("config.json", "model.safetensors")}
    lineage = {
        "stage": folder.name,
        "verb": verb,
        "key": sha(f"key of {folder.name}"),
        "config": config,
        "services": {},
        "inputs": reads,
        "files": {"/secret/place/world.py": sha("world"), "prompts/think.txt": sha("think")},
        "outputs": {name: {"sha256": digest, "size": 1} for name, digest in outputs.items()},
        "code": {"version": "0.1.0", "sha256": sha("code")},
    }
    (folder / "lineage.json").write_text(json.dumps(lineage))
    return folder_hash((name.removeprefix("hf/"), digest) for name, digest in outputs.items())


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """base -> r1, evaluated."""
    base = stage(tmp_path / "base", "pretrain", {})
    r1 = stage(
        tmp_path / "r1",
        "rl",
        {"base": {"hf": base}},
        model={"path": "@base/hf"},
        data={"template": "r1_chat"},
        optim={"lr": 3e-6},
        cache="/secret/cache",
    )
    stage(tmp_path / "evaluate_r1", "evaluate", {"r1": {"hf": r1}}, model={"path": "@r1/hf"})
    (tmp_path / "evaluate_r1/results.json").write_text(json.dumps(RESULTS))
    return tmp_path


def test_metadata_as_the_hub_reads_it(recipe: Path) -> None:
    section = CardConfig(license="mit", base_model="lab/base", language=["en", "zh"])
    data = ModelCard(card(HF, recipe / "r1/hf", section)).data
    assert data.license == "mit"
    assert data.base_model == "lab/base"
    assert data.language == ["en", "zh"]
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert {"megatron-r1", "deepseek_v3", "mixture-of-experts", "reasoning"} == set(data.tags)
    assert [(one.dataset_name, one.metric_type, one.metric_value) for one in data.eval_results] == [
        ("aime", "pass@1", 0.798),
        ("aime", "cons@64", 0.867),
    ]


def test_lineage_and_results(recipe: Path) -> None:
    text = card(HF, recipe / "r1/hf", CardConfig(license="mit"))
    assert "# r1\n" in text
    assert f"| `base/hf` | `{json.loads((recipe / 'r1/lineage.json').read_text())['inputs']['base']['hf']}` |" in text
    assert f"`{sha('key of r1')}`" in text
    assert f"| base | pretrain |  | `{sha('key of base')[:16]}` |\n| r1 | rl | base | " in text
    assert f"| `prompts/think.txt` | `{sha('think')}` |" in text
    assert "lr = 3e-6" in text or "lr = 3e-06" in text
    assert "| aime | pass@1 | 79.8 % (71.0 to 87.0) | 30 |" in text
    assert "mean_tokens" not in text
    assert "<｜User｜>{question}<｜Assistant｜><think>" in text
    assert "temperature=0.6, top_p=0.95" in text
    assert "reasons between `<think>` and `</think>`" in text


def test_says_nothing_of_this_machine_and_always_the_same(recipe: Path) -> None:
    text = card(HF, recipe / "r1/hf")
    assert "secret" not in text
    assert "someone" not in text
    assert str(recipe) not in text
    assert "world.py" in text
    assert card(HF, recipe / "r1/hf") == text
    assert "\n\n\n" not in text


def test_a_stage_that_was_run_again_since_is_no_ancestor(recipe: Path) -> None:
    lineage = json.loads((recipe / "base/lineage.json").read_text())
    lineage["outputs"]["hf/model.safetensors"]["sha256"] = sha("another")
    (recipe / "base/lineage.json").write_text(json.dumps(lineage))
    text = card(HF, recipe / "r1/hf")
    assert sha("key of base")[:16] not in text
    assert "`base/hf`" in text  # what was read, still true


def test_figures_of_other_weights_are_left_out(recipe: Path) -> None:
    lineage = json.loads((recipe / "r1/lineage.json").read_text())
    lineage["outputs"]["hf/model.safetensors"]["sha256"] = sha("another")
    (recipe / "r1/lineage.json").write_text(json.dumps(lineage))
    assert "## Results" not in card(HF, recipe / "r1/hf")


def test_lineage_of_an_exported_folder_is_given(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert "No recipe's record" in card(HF, tmp_path / "out")
    text = card(HF, tmp_path / "out", CardConfig(lineage=recipe / "r1/lineage.json"))
    assert f"`{sha('key of r1')}`" in text


def test_without_lineage_it_says_what_it_was_converted_from(tmp_path: Path) -> None:
    text = card(HF, tmp_path, CardConfig(name="smol"), Conversion("cast", "smol.gguf", "0.1.0"))
    assert "# smol\n" in text
    assert "written by `megatron-r1 cast` (megatron-r1 0.1.0) from `smol.gguf`.\n\n## How to use it" in text
    assert "No recipe's record" not in text
    assert "reasoning" not in text
    assert "temperature" not in text  # nothing is known of how it samples best
    assert "\n\n\n" not in text


def test_what_the_card_of_the_source_says_holds_on(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: x\nlanguage: [de]\ntags: [old]\n---\n# Old\n"
    )
    data = ModelCard(card(HF, tmp_path)).data
    assert (data.license, data.license_name, data.language) == ("other", "x", ["de"])
    assert "old" not in data.tags
    data = ModelCard(card(HF, tmp_path, CardConfig(license="mit", language=["fr"]))).data
    assert (data.license, data.get("license_name"), data.language) == ("mit", None, ["fr"])


@pytest.mark.parametrize("text", ["# no metadata", "---\nlicense: [\n---\n", "---\n- a list\n---\n", "---", "\xff---"])
def test_another_card_of_the_source_is_no_obstacle(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(text.encode("latin-1"))
    assert "| License | none was given |" in card(HF, tmp_path)


def test_results_of_the_harness(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    tasks = {"gsm8k": {"version": 3, "questions": 1319, "exact_match,strict": 0.5, "exact_match_error,strict": 0.01}}
    file.write_text(json.dumps({"harness": "lm_eval 0.4.13", "tasks": tasks, "groups": {}}))
    text = card(HF, tmp_path, section=CardConfig(results=[file]))
    assert "| gsm8k | exact_match,strict | 50.0 ± 2.0 % | 1,319 |" in text
    assert "lm_eval 0.4.13" in text
    file.write_text("[]")
    with pytest.raises(DataError, match=r"results\.json"):
        card(HF, tmp_path, section=CardConfig(results=[file]))


def test_a_reward_model(tmp_path: Path) -> None:
    stage(tmp_path / "helpful", "reward-model", {}, data=[{"path": "@pairs/pairs.jsonl"}])
    text = card(HF | {"architectures": ["DeepseekV3ForSequenceClassification"]}, tmp_path / "helpful/hf")
    assert "pipeline_tag: text-classification" in text
    assert "--runner pooling" in text
    assert "generate" not in text


@pytest.mark.parametrize("place", ["jinja", "config", "several", "none"])
def test_the_chat_template_wherever_it_stands(place: str, tmp_path: Path) -> None:
    template = "{{ messages }}<think>"
    if place == "jinja":
        (tmp_path / "chat_template.jinja").write_text(template)
    elif place != "none":
        several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
        config = {"chat_template": several if place == "several" else template}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert chat_template(tmp_path) == (None if place == "none" else template)
    text = card(HF, tmp_path)
    assert ("apply_chat_template" in text) == (place != "none")
    assert ("`<think>`" in text) == (place != "none")


def test_a_record_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "lineage.json").write_text('{"stage": "r1"}')
    with pytest.raises(DataError, match=r"lineage\.json is not the lineage"):
        card(HF, tmp_path)
    with pytest.raises(DataError, match="No such file"):
        card(HF, tmp_path, CardConfig(lineage=tmp_path / "gone.json"))
