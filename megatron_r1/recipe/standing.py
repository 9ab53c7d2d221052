"""How each stage stands: finished with what it would be given now, half done, out of date."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_r1.errors import DataError
from megatron_r1.recipe.artefacts import artefacts, content
from megatron_r1.recipe.hashes import Hashes
from megatron_r1.recipe.outside import place
from megatron_r1.recipe.plan import Plan, Stage
from megatron_r1.recipe.record import Record, key_of, read_lineage

State = Literal["done", "new", "waiting", "started", "changed"]
"""done: nothing to do; new: never run; waiting: it has run, but a stage before it is not done, so nobody can know;
started: it goes on in its folder; changed: what lies in its folder is of other settings or inputs, or not whole."""


@dataclass(frozen=True)
class Standing:
    """One stage's state."""

    state: State
    why: str = ""
    """For people: what has changed, which stage it waits for, how it ended."""
    record: Record | None = None
    """Of its folder, where there is one."""


class Ledger:
    """Compares the stages of a plan with what lies in the output folder."""

    def __init__(self, plan: Plan, hashes: Hashes) -> None:
        self.plan, self.hashes = plan, hashes

    def standings(self) -> dict[str, Standing]:
        """Of all stages, in order; nothing is hashed for stages that have never run."""
        found: dict[str, Standing] = {}
        for stage in self.plan.stages:
            waits = [name for name in stage.needs if found[name].state != "done"]
            found[stage.name] = self._waiting(stage, waits) if waits else self.standing(stage)
        return found

    def standing(self, stage: Stage) -> Standing:
        """Of one stage whose needs are done."""
        folder = self.plan.folder(stage)
        if not folder.exists():
            return Standing("new")
        record = Record.read(folder)
        if record is None:
            return Standing("changed", "its folder was not made by this recipe")
        try:
            made_of = self.made_of(stage)
        except DataError as error:
            return Standing("changed", str(error), record)
        if record.key != key_of(made_of):
            return Standing("changed", difference(record.made_of, made_of), record)
        lineage = read_lineage(folder)
        if lineage is None:
            return Standing("started", record.attempts[-1].state if record.attempts else "", record)
        if broken := self._broken(folder, lineage):
            return Standing("changed", broken, record)
        return Standing("done", "", record)

    def made_of(self, stage: Stage) -> dict[str, Any]:
        """What decides the results of a stage: its settings, and the content of what it reads.

        Raises:
            DataError: something that it reads is not there.
        """
        files = {}
        for text in stage.files:
            digest = self.hashes.path(place(text))
            if digest is None:
                raise missing_file(stage, text)
            files[text] = digest
        return {
            "verb": stage.verb,
            "settings": stage.settings,
            "services": {name: self.plan.services[name].command for name in stage.services},
            "inputs": {text: content(self.plan, text, self.hashes) for text in stage.reads},
            "files": files,
        }

    def _waiting(self, stage: Stage, waits: list[str]) -> Standing:
        folder = self.plan.folder(stage)
        record = Record.read(folder) if folder.exists() else None
        return Standing("waiting", f"for {', '.join(waits)}", record) if record else Standing("new")

    def _broken(self, folder: Path, lineage: dict[str, Any]) -> str:
        there = artefacts(folder)
        for name, output in lineage["outputs"].items():
            if name not in there:
                return f"its {name} is gone"
            if self.hashes.file(there[name]) != output["sha256"]:
                return f"its {name} is no longer what it wrote"
        return ""


def missing_file(stage: Stage, text: str) -> DataError:
    """The error about a file or folder outside the recipe."""
    return DataError(
        f"stage {stage.name}: {text} does not exist ({place(text).absolute()}); correct the path, or put it there"
    )


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """For people: the first things in which two `made_of` differ."""
    before, after = _flat(old), _flat(new)
    changed = [name for name in dict.fromkeys([*before, *after]) if before.get(name) != after.get(name)]
    return ", ".join(_say(name, before.get(name), after.get(name)) for name in changed[:3]) + (
        f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    )


def _say(name: tuple[str, ...], before: Any, after: Any) -> str:
    part, *rest = name
    if part in {"inputs", "files"}:
        return f"{rest[0]} {'is new' if before is None else 'is no longer read' if after is None else 'has changed'}"
    return f"{'.'.join(rest) or part}: {before} -> {after}"


def _flat(tree: Any, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, (*prefix, key))
    return flat
