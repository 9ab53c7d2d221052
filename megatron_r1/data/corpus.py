"""`megatron-r1 data generate`: worked solutions as documents for pretraining a base model."""

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich.progress import track

from megatron_r1.config import component
from megatron_r1.config.runs import GenerateConfig
from megatron_r1.data.files import write_json, write_lines
from megatron_r1.data.questions import distinct, heldout, texts
from megatron_r1.data.tasks.base import Task
from megatron_r1.data.templates import render
from megatron_r1.data.worked import styles
from megatron_r1.errors import ConfigError, nearest
from megatron_r1.seeds import stream_seed


def generate(config: GenerateConfig) -> dict[str, Any]:
    """Write `train.jsonl` and `validation.jsonl`, one `{"text", "style"}` a line.

    Held-out questions appear in neither file.

    Returns:
        Documents, documents of each style, characters, and how many questions were held out.

    Raises:
        ConfigError: unknown task, style or template, or shares that sum to zero.
    """
    task: Task = component.build("task", config.task)
    _check_quality(config, task.name)
    excluded = texts(heldout(config.heldout, config.heldout_questions)) if config.heldout else frozenset()
    summary: dict[str, Any] = {"task": task.name, "heldout_questions": len(excluded)}
    for split, size in (("train", config.documents), ("validation", config.validation_documents)):
        documents = _documents(config, task, split, excluded)
        rows = [next(documents) for _ in track(range(size), description=f"{split} documents")]
        write_lines(config.output / f"{split}.jsonl", rows)
        summary[split] = {
            "documents": len(rows),
            "characters": sum(len(row["text"]) for row in rows),
            "styles": dict(sorted(Counter(row["style"] for row in rows).items())),
        }
    write_json(config.output / "summary.json", summary)
    return summary


def _documents(config: GenerateConfig, task: Task, split: str, excluded: frozenset[str]) -> Iterator[dict[str, str]]:
    seed = stream_seed("corpus", split, config.seed)
    rng = random.Random(seed)
    solve = styles(task.name)
    names, shares = list(config.quality), list(config.quality.values())
    for problem in distinct(task, seed, excluded, repeats=True):
        style = rng.choices(names, shares)[0]
        text = render(config.template, problem.text) + solve[style](problem, rng)
        yield {"text": text, "style": style}


def _check_quality(config: GenerateConfig, task: str) -> None:
    known = styles(task)
    for name in config.quality:
        if name not in known:
            raise ConfigError(
                f"quality: {task!r} has no style {name!r}{nearest(name, known)}; it has {', '.join(known)}"
            )
    if sum(config.quality.values()) <= 0:
        raise ConfigError(f"quality: the shares {config.quality} sum to 0; give at least one style a positive share")
