"""Which files of a stage are its results, and what another stage reads of them."""

from pathlib import Path

from megatron_r1.errors import DataError
from megatron_r1.recipe.hashes import Hashes, files_of, folder_hash
from megatron_r1.recipe.plan import Plan, Stage
from megatron_r1.recipe.tree import reference

WORKING = {"checkpoints", "logs", "tensorboard", "wandb", "cache", "sync", "heartbeats", "bad_batches"}
"""Folders of a stage that serve the run itself: to go on, to look into it, to hand weights over."""
ABOUT = {
    "stage.json",
    "stage.toml",
    "lineage.json",
    "config.toml",
    "run.json",
    "run.log",
    "report.html",
    "skipped_rows.json",
}
"""Files of a stage that tell about the run."""
FIGURES = {"summary.json", "results.json", "metrics.jsonl"}
"""Results that hold times, so that they differ even where nothing else does: not part of what "@stage" names."""


def artefacts(folder: Path) -> dict[str, Path]:
    """Name -> file of a stage's results. Hidden files and what a verb is just writing do not count."""
    return {
        name: file
        for name, file in files_of(folder).items()
        if name.split("/", maxsplit=1)[0] not in WORKING | ABOUT and not name.endswith(".partial")
    }


def content(plan: Plan, text: str, hashes: Hashes) -> str:
    """The hash of what "@stage/rest" names; "@stage" means its results without `FIGURES`.

    Raises:
        DataError: there is no such thing; what the stage has written is listed.
    """
    stage, rest = reference(text) or ("", "")
    folder = plan.output / stage
    if rest:
        digest = hashes.path(folder / rest)
    else:
        files = [(name, hashes.file(file)) for name, file in artefacts(folder).items() if name not in FIGURES]
        digest = folder_hash(files) if files else None
    if digest is None:
        raise missing(plan, text)
    return digest


def is_there(plan: Plan, text: str) -> bool:
    """Is there what "@stage/rest" names?"""
    stage, rest = reference(text) or ("", "")
    return bool(files_of(plan.output / stage / rest) if rest else artefacts(plan.output / stage))


def missing(plan: Plan, text: str) -> DataError:
    """The error about a result that is not there."""
    stage, rest = reference(text) or ("", "")
    folder = plan.output / stage
    there = sorted({name.split("/", maxsplit=1)[0] for name in artefacts(folder)})
    readers = [reader.name for reader in plan.stages if text in reader.reads]
    return DataError(
        f"{', '.join(readers)}: {text!r} is not there: the stage {stage} has written "
        f"{', '.join(there) or 'nothing'} into {folder}, but no {rest or 'results'}; correct the path in the recipe, "
        "the same command then goes on from there"
    )


def check_promises(plan: Plan, stage: Stage) -> None:
    """What later stages read of a finished stage is there.

    Raises:
        DataError: something is not.
    """
    for reader in plan.stages:
        for text in reader.reads:
            if (reference(text) or ("", ""))[0] == stage.name and not is_there(plan, text):
                raise missing(plan, text)
