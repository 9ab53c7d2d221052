"""What is known of one stage's folder: `stage.json` while it runs, `lineage.json` when it has finished."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import megatron_r1
from megatron_r1.data.files import write_json
from megatron_r1.errors import DataError
from megatron_r1.recipe.artefacts import artefacts
from megatron_r1.recipe.hashes import Hashes, files_of, folder_hash
from megatron_r1.recipe.plan import Plan, Stage
from megatron_r1.recipe.tree import reference

RECORD = "stage.json"
LINEAGE = "lineage.json"
SUPERSEDED = "superseded"


@dataclass
class Attempt:
    """One time that a stage was started."""

    started: str
    """ISO 8601, UTC."""
    seconds: float = 0.0
    """So far, to a few seconds, where it was killed."""
    state: str = "running"
    """"running" (or killed with the recipe), "done", "failed", "interrupted"."""


@dataclass
class Record:
    """`stage.json`: what a stage was started with, and its attempts."""

    stage: str
    verb: str
    key: str
    made_of: dict[str, Any]
    """What the key is the hash of."""
    attempts: list[Attempt] = field(default_factory=list)

    def begin(self) -> Attempt:
        """Another attempt."""
        self.attempts.append(Attempt(now()))
        return self.attempts[-1]

    def ended_well(self) -> bool:
        """Has its verb done all that it had to do?"""
        return bool(self.attempts) and self.attempts[-1].state == "done"

    @property
    def seconds(self) -> float:
        """Of all attempts."""
        return round(sum(attempt.seconds for attempt in self.attempts), 3)

    def save(self, folder: Path) -> None:
        """Write it into the stage's folder."""
        write_json(folder / RECORD, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "Record | None":
        """That of a folder, None if it has none.

        Raises:
            DataError: it cannot be read.
        """
        tree = _read(folder / RECORD)
        try:
            return cls(**tree | {"attempts": [Attempt(**attempt) for attempt in tree["attempts"]]}) if tree else None
        except (TypeError, KeyError) as error:
            raise DataError(f"{folder / RECORD} is not what a recipe writes ({error}); remove it") from error


def read_lineage(folder: Path) -> dict[str, Any] | None:
    """`lineage.json` of a finished stage, None if it has not finished."""
    return _read(folder / LINEAGE)


def write_lineage(plan: Plan, stage: Stage, record: Record, hashes: Hashes) -> None:
    """Say of a finished stage what it was made of and what it has made."""
    folder = plan.folder(stage)
    inputs: dict[str, dict[str, str]] = {}
    for text, digest in record.made_of["inputs"].items():
        name, rest = reference(text) or ("", "")
        inputs.setdefault(name, {})[rest or "."] = digest
    files = artefacts(folder)
    outputs = {name: {"sha256": hashes.file(file), "size": file.stat().st_size} for name, file in files.items()}
    lineage = {
        "stage": stage.name,
        "verb": stage.verb,
        "key": record.key,
        "config": stage.config,
        "services": record.made_of["services"],
        "inputs": inputs,
        "files": record.made_of["files"],
        "outputs": outputs,
        "code": {"version": megatron_r1.__version__, "sha256": code_hash()},
        "started": record.attempts[0].started,
        "finished": now(),
        "seconds": record.seconds,
        "attempts": len(record.attempts),
    }
    write_json(folder / LINEAGE, lineage)


def supersede(plan: Plan, name: str) -> Path | None:
    """Move a stage's folder out of the way. Returns where to, None if there was none."""
    folder = plan.output / name
    if not folder.exists():
        return None
    number = 1
    while (target := plan.output / SUPERSEDED / f"{name}-{number}").exists():
        number += 1
    target.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(target)
    return target


def key_of(made_of: dict[str, Any]) -> str:
    """The hash of what decides a stage's results."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


@cache
def code_hash() -> str:
    """The hash of this package's sources, as that of a folder of its Python files."""
    package = Path(megatron_r1.__file__).parent
    sources = [(name, file) for name, file in files_of(package).items() if name.endswith(".py")]
    return folder_hash((name, hashlib.sha256(file.read_bytes()).hexdigest()) for name, file in sources)


def now() -> str:
    """The time, as it stands in records."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read(file: Path) -> dict[str, Any] | None:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}); remove it, its stage then runs anew") from error
    if not isinstance(tree, dict):
        raise DataError(f"{file} holds no JSON object; remove it, its stage then runs anew")
    return tree
