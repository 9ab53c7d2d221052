"""`megatron-r1 data generate`: documents from several sources, to pretrain a base model on."""

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich.progress import track

from megatron_r1.config import component
from megatron_r1.config.generate import GenerateConfig, split
from megatron_r1.data.files import write_json, write_lines
from megatron_r1.data.questions import heldout, texts
from megatron_r1.data.source import Document, Source
from megatron_r1.errors import ConfigError
from megatron_r1.seeds import stream_seed


def generate(config: GenerateConfig) -> dict[str, Any]:
    """Write `train.jsonl` and `validation.jsonl`, one `{"text", "prompt", "response", "source", "style"}` a line.

    `text`, which pretraining reads, is prompt and response; `collect` takes the two as ready rows. Held-out questions
    appear in neither file.

    Returns:
        Documents, documents of each source and style, characters, and how many questions were held out.

    Raises:
        ConfigError: a source that cannot be built, or shares that sum to zero.
    """
    shares, sources = {}, {}
    for name, section in config.sources.items():
        shares[name], own = split(section)
        sources[name] = component.build("source", own)
    if sum(shares.values()) <= 0:
        raise ConfigError(
            f"the shares of [sources] sum to 0; give at least one of {', '.join(shares)} a positive share"
        )
    excluded = texts(heldout(config.heldout, config.heldout_questions)) if config.heldout else frozenset()
    summary: dict[str, Any] = {"heldout_questions": len(excluded)}
    for number, size in (("train", config.documents), ("validation", config.validation_documents)):
        documents = _mixed(sources, shares, stream_seed("corpus", number, config.seed), excluded)
        rows = [next(documents) for _ in track(range(size), description=f"{number} documents")]
        write_lines(config.output / f"{number}.jsonl", rows)
        summary[number] = {
            "documents": len(rows),
            "characters": sum(len(row["text"]) for row in rows),
            "sources": dict(sorted(Counter(row["source"] for row in rows).items())),
            "styles": dict(sorted(Counter(row["style"] for row in rows).items())),
        }
    write_json(config.output / "summary.json", summary)
    return summary


def _mixed(
    sources: dict[str, Source], shares: dict[str, float], seed: int, excluded: frozenset[str]
) -> Iterator[dict[str, str]]:
    """Rows in a random order of their sources, each source's own stream in its own order."""
    rng = random.Random(stream_seed("mixed", seed))
    streams = {name: source.documents(stream_seed(name, seed), excluded) for name, source in sources.items()}
    while True:
        name = rng.choices(list(shares), list(shares.values()))[0]
        document: Document = next(streams[name])
        text = {"text": document.prompt + document.response, "prompt": document.prompt, "response": document.response}
        yield {**text, "source": name, "style": document.style}
