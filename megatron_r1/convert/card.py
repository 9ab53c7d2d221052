"""README.md of a Hugging Face folder: the model card, with the lineage that a recipe has recorded."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from yaml import YAMLError

from megatron_r1.config.card import CardConfig
from megatron_r1.convert.ancestry import StageRecord, ancestry, evaluations, find_lineage, read_stage
from megatron_r1.convert.figures import hub_index, read_results, rows
from megatron_r1.data.templates import TEMPLATES
from megatron_r1.errors import DataError
from megatron_r1.model.family import HFConfig
from megatron_r1.model.scalar_head import CLASSIFIER

CARD = "README.md"
TEMPERATURE, TOP_P = 0.6, 0.95
"""Sampling that the authors of DeepSeek-R1 advise: colder, a model repeats itself; hotter, it loses the thread."""
LONGEST_RESPONSE = 32768
"""Tokens: where the authors cut a response in their evaluations."""
SHORT_RESPONSE = 512
"""Of a model that does not reason first."""
_INHERITED = ("license", "license_name", "license_link", "language", "base_model")
"""Keys of a card's metadata that hold of the same model in other numbers, too."""
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


@dataclass(frozen=True)
class Conversion:
    """How a folder was made of another checkpoint."""

    verb: str
    source: str
    """The checkpoint's name; where on a machine it stood is nobody's business."""
    version: str
    """Of this package."""


def card(hf: HFConfig, source: Path, section: CardConfig | None = None, conversion: Conversion | None = None) -> str:
    """A model card: the same text from the same files.

    Args:
        hf: `config.json` of the model.
        source: where its tokenizer, generation settings and perhaps an earlier card stand, in a recipe's stage or not.
        section: what is said of it.
        conversion: None = the model was not converted.

    Raises:
        DataError: a lineage or results that cannot be read.
    """
    section = section or CardConfig()
    found, earlier = section.lineage or find_lineage(source), earlier_card(source)
    stage = read_stage(found) if found else None
    name = section.name or (stage.name if stage else source.absolute().name)
    results = [read_results(path) for path in section.results or (evaluations(stage) if stage else ())]
    score = hf["architectures"][0].endswith(CLASSIFIER)
    template, prompt = chat_template(source), _prompt(stage)
    thinks = "<think>" in (template or prompt or "")
    longest = LONGEST_RESPONSE if thinks else SHORT_RESPONSE
    body = (
        _environment()
        .get_template("card.md.j2")
        .render(
            name=name,
            license=section.license or earlier.get("license"),
            base_model=section.base_model or earlier.get("base_model"),
            conversion=conversion,
            architecture=hf["architectures"][0],
            score=score,
            facts=_facts(hf),
            stage=stage,
            stages=ancestry(stage) if stage else [],
            settings=tomli_w.dumps(_without_places(stage.config)).strip() if stage else "",
            results=[(result, rows(result)) for result in results],
            chat=template is not None,
            thinks=thinks,
            prompt=prompt,
            example=json.dumps((prompt or "{question}").replace("{question}", _EXAMPLE), ensure_ascii=False),
            question=_EXAMPLE,
            response_tokens=min(longest, hf.get("max_position_embeddings", longest) // 2),
            sampling=f', "temperature": {TEMPERATURE}, "top_p": {TOP_P}' if thinks else "",
            temperature=TEMPERATURE,
            top_p=TOP_P,
        )
    )
    kind = "reward-model" if score else "reasoning" if thinks else None
    data = _metadata(hf, name, kind, {**earlier, **_said(section)}, results)
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


def earlier_card(folder: Path) -> dict[str, Any]:
    """What the README.md of a model folder, if it has one, says of licence, languages and base model to the hub."""
    path = folder / CARD
    if not path.is_file() or not (text := path.read_text(encoding="utf-8", errors="replace")).startswith("---"):
        return {}
    try:
        said = ModelCard(text, ignore_metadata_errors=True).data
    except (ValueError, YAMLError):  # a card for people only
        return {}
    return {key: said[key] for key in _INHERITED if said.get(key)}


def _said(section: CardConfig) -> dict[str, Any]:
    """What the user says himself. With a licence of his own, an earlier one's name and link are void."""
    void = dict.fromkeys(("license_name", "license_link")) if section.license else {}
    return {key: value for key in _INHERITED if (value := getattr(section, key, None))} | void


def _metadata(
    hf: HFConfig, name: str, kind: str | None, said: dict[str, Any], results: list[dict[str, Any]]
) -> ModelCardData:
    return ModelCardData(
        **said,
        library_name="transformers",
        pipeline_tag="text-classification" if kind == "reward-model" else "text-generation",
        tags=[*_tags(hf), *([kind] if kind else [])],
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


def _tags(hf: HFConfig) -> list[str]:
    tags = ["megatron-r1", *([hf["model_type"]] if "model_type" in hf else [])]
    if any(hf.get(key) for key in _EXPERTS):
        tags.append("mixture-of-experts")
    if hf.get("quantization_config"):
        tags.append(str(hf["quantization_config"].get("quant_method", "quantized")))
    return tags


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
