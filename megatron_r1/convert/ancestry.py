"""How a model was made, from the records that a recipe leaves beside it: `lineage.json` of each stage."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.errors import DataError

LINEAGE = "lineage.json"
EVALUATIONS = ("evaluate", "lm-eval")
"""Verbs whose results are figures of a model."""
_DEPTH = 2
"""A model stands at most this many folders below its stage: `checkpoints/step_00000010`."""


@dataclass(frozen=True)
class StageRecord:
    """One finished stage of a recipe."""

    folder: Path
    name: str
    verb: str
    key: str
    """SHA-256 of its verb, its settings and the content of all that it read."""
    config: dict[str, Any]
    inputs: dict[str, dict[str, str]]
    """Stage -> path in its folder ("." = all of its results) -> SHA-256 of the content that was read."""
    files: list[tuple[str, str]]
    """Name and hash of files from outside of the recipe; where on a machine they stand is nobody's business."""
    outputs: dict[str, str]
    """Path in its folder -> SHA-256 of the content that was written."""
    version: str
    """Of this package, which ran it."""


def find_lineage(model: Path) -> Path | None:
    """The `lineage.json` of the stage in whose folder a model stands, None if it is of no recipe."""
    folders = [model, *model.absolute().parents][: _DEPTH + 1]
    return next((folder / LINEAGE for folder in folders if (folder / LINEAGE).is_file()), None)


def read_stage(lineage: Path) -> StageRecord:
    """One stage's record.

    Raises:
        DataError: missing, or not what a recipe writes.
    """
    try:
        tree = json.loads(lineage.read_text(encoding="utf-8"))
        return StageRecord(
            folder=lineage.absolute().parent,
            name=tree["stage"],
            verb=tree["verb"],
            key=tree["key"],
            config=tree["config"],
            inputs={stage: dict(paths) for stage, paths in tree["inputs"].items()},
            files=[(_shown(file), digest) for file, digest in tree["files"].items()],
            outputs={name: written["sha256"] for name, written in tree["outputs"].items()},
            version=tree["code"]["version"],
        )
    except OSError as error:
        raise DataError(f"cannot read {lineage}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{lineage} is not the lineage of a recipe's stage ({type(error).__name__}: {error})"
        ) from error


def ancestry(stage: StageRecord) -> list[StageRecord]:
    """The stage and all that it was made of, each after what it needs.

    One whose folder is gone, or that has been run again since with other results, is left out.
    """
    found: dict[str, StageRecord] = {}

    def visit(record: StageRecord) -> None:
        for name, read in record.inputs.items():
            lineage = stage.folder.parent / name / LINEAGE
            if name in found or not lineage.is_file():
                continue
            maker = read_stage(lineage)
            if all(_wrote(maker, path, digest) for path, digest in read.items()):
                visit(maker)
        found.setdefault(record.name, record)

    visit(stage)
    return list(found.values())


def evaluations(stage: StageRecord) -> list[Path]:
    """`results.json` of the stages of the same recipe that evaluated just what this one wrote."""
    found = []
    for lineage in sorted(stage.folder.parent.glob(f"*/{LINEAGE}")):
        record, results = read_stage(lineage), lineage.with_name("results.json")
        if record.verb not in EVALUATIONS or stage.name not in record.inputs or not results.is_file():
            continue
        model = record.config["model"]["path"].removeprefix(f"@{stage.name}/")
        digest = record.inputs[stage.name].get(model)
        if digest and _wrote(stage, model, digest):
            found.append(results)
    return found


def _wrote(stage: StageRecord, path: str, digest: str) -> bool:
    """Whether what was read of a stage is what it has written, as far as its record tells.

    The hash of a folder is that of the lines that `sha256sum` prints for its files.
    """
    if path in stage.outputs:
        return stage.outputs[path] == digest
    files = {name.removeprefix(f"{path}/"): sha for name, sha in stage.outputs.items() if name.startswith(f"{path}/")}
    lines = "".join(f"{sha}  {name}\n" for name, sha in sorted(files.items()))
    return not files or hashlib.sha256(lines.encode()).hexdigest() == digest


def _shown(file: str) -> str:
    return Path(file).name if Path(file).is_absolute() else file
