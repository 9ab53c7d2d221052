"""README.md of a Hugging Face folder: the model card, with the lineage that a recipe has recorded."""

import json
from pathlib import Path
from typing import Any

import tomli_w
from huggingface_hub import ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from megatron_r1.config.inspect import CardSection
from megatron_r1.convert.ancestry import StageRecord, ancestry, evaluations, find_lineage, read_stage
from megatron_r1.convert.figures import hub_index, read_results, rows
from megatron_r1.data.files import aside
from megatron_r1.data.templates import TEMPLATES
from megatron_r1.errors import DataError
from megatron_r1.model.family import HFConfig
from megatron_r1.model.hf_folder import read_config
from megatron_r1.model.scalar_head import CLASSIFIER

CARD = "README.md"
TEMPERATURE, TOP_P = 0.6, 0.95
"""Sampling that the authors of DeepSeek-R1 advise: colder, a model repeats itself; hotter, it loses the thread."""
LONGEST_RESPONSE = 32768
"""Tokens: where the authors cut a response in their evaluations."""
_EXAMPLE = "How many primes are below 100?"
_FACTS = {
    "model_type": "Model type",
    "num_hidden_layers": "Layers",
    "hidden_size": "Hidden size",
    "num_attention_heads": "Attention heads",
    "num_key_value_heads": "Key/value heads",
    "num_nextn_predict_layers": "Multi-token-prediction layers",
    "vocab_size": "Vocabulary",
    "max_position_embeddings": "Context, tokens",
}
_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")


def write_card(folder: Path, section: CardSection) -> None:
    """Write `folder/README.md`.

    Raises:
        DataError: no config.json, or a lineage or results that cannot be read.
    """
    text = card(read_config(folder), folder, section.license, section.lineage, section)
    with aside(folder / CARD) as partial:
        partial.write_text(text, encoding="utf-8")


def card(
    hf: HFConfig,
    source: Path,
    license: str | None = None,  # noqa: A002 (the hub's own word)
    lineage: Path | None = None,
    section: CardSection | None = None,
) -> str:
    """A model card: the same text from the same files.

    Args:
        hf: `config.json` of the model.
        source: where its tokenizer and generation settings stand, in a recipe's stage or not.
        license: identifier as on the Hugging Face hub.
        lineage: `lineage.json` of the stage that made it; None = look for it around `source`.
        section: what else is said of it.

    Raises:
        DataError: a lineage or results that cannot be read.
    """
    section = section or CardSection()
    found = lineage or find_lineage(source)
    stage = read_stage(found) if found else None
    name = section.name or (stage.name if stage else source.absolute().name)
    results = [read_results(path) for path in section.results or (evaluations(stage) if stage else ())]
    score = hf["architectures"][0].endswith(CLASSIFIER)
    template, prompt = chat_template(source), _prompt(stage)
    body = (
        _environment()
        .get_template("card.md.j2")
        .render(
            name=name,
            license=license,
            base_model=section.base_model,
            architecture=hf["architectures"][0],
            score=score,
            facts=_facts(hf),
            stage=stage,
            stages=ancestry(stage) if stage else [],
            settings=tomli_w.dumps(_without_places(stage.config)).strip() if stage else "",
            results=[(result, rows(result)) for result in results],
            chat=template is not None,
            thinks="<think>" in (template or prompt or ""),
            prompt=prompt,
            example=json.dumps((prompt or "{question}").replace("{question}", _EXAMPLE), ensure_ascii=False),
            question=_EXAMPLE,
            response_tokens=min(LONGEST_RESPONSE, hf.get("max_position_embeddings", LONGEST_RESPONSE) // 2),
            temperature=TEMPERATURE,
            top_p=TOP_P,
        )
    )
    data = _metadata(hf, name, license, section, results)
    return f"---\n{data.to_yaml()}\n---\n\n{body.rstrip()}\n"


def chat_template(folder: Path) -> str | None:
    """The chat template of a model folder, None if it has none.

    Raises:
        DataError: tokenizer_config.json is not JSON.
    """
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    path = folder / "tokenizer_config.json"
    try:
        template = json.loads(path.read_text(encoding="utf-8")).get("chat_template") if path.is_file() else None
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} is not a JSON object: {error}") from error
    if isinstance(template, list):  # several, by name
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template


def _metadata(
    hf: HFConfig, name: str, license_name: str | None, section: CardSection, results: list[dict[str, Any]]
) -> ModelCardData:
    score = hf["architectures"][0].endswith(CLASSIFIER)
    return ModelCardData(
        license=license_name,
        base_model=section.base_model,
        language=section.language or None,
        library_name="transformers",
        pipeline_tag="text-classification" if score else "text-generation",
        tags=_tags(hf, score),
        model_name=name,
        eval_results=hub_index(results) or None,
    )


def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, from the user's own files
    )


def _tags(hf: HFConfig, score: bool) -> list[str]:
    tags = ["megatron-r1", *([hf["model_type"]] if "model_type" in hf else [])]
    if any(hf.get(key) for key in _EXPERTS):
        tags.append("mixture-of-experts")
    if hf.get("quantization_config"):
        tags.append(str(hf["quantization_config"].get("quant_method", "quantized")))
    return [*tags, "reward-model" if score else "reasoning"]


def _facts(hf: HFConfig) -> list[tuple[str, str]]:
    facts = [("Architecture", f"`{hf['architectures'][0]}`")]
    facts += [(label, _number(hf[key])) for key, label in _FACTS.items() if hf.get(key) is not None]
    if experts := next((hf[key] for key in _EXPERTS if hf.get(key)), None):
        facts.append(("Routed experts", f"{_number(experts)}, of which a token takes {hf.get('num_experts_per_tok')}"))
    if quantization := hf.get("quantization_config"):
        facts.append(("Quantization", f"{quantization.get('quant_method')}, {quantization.get('fmt', '')}".strip(", ")))
    elif stored := hf.get("dtype", hf.get("torch_dtype")):
        facts.append(("Weights", str(stored)))
    return facts


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _prompt(stage: StageRecord | None) -> str | None:
    """The template that the model was trained with, where its stage names one."""
    data = stage.config.get("data") if stage else None
    template = data.get("template") if isinstance(data, dict) else None
    return TEMPLATES.get(template, template) if isinstance(template, str) else None


def _without_places(tree: Any) -> Any:
    """Settings for strangers: absolute paths shortened to names."""
    if isinstance(tree, dict):
        return {key: _without_places(value) for key, value in tree.items() if value is not None}
    if isinstance(tree, list):
        return [_without_places(value) for value in tree]
    return Path(tree).name if isinstance(tree, str) and tree.startswith("/") else tree
