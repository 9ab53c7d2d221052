"""`megatron-r1 run`: the stages of a recipe, one after another; what is done already is not done again."""

import errno
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from megatron_r1.data.files import write_json
from megatron_r1.errors import DataError, UserError
from megatron_r1.recipe.artefacts import check_promises
from megatron_r1.recipe.choice import Choice
from megatron_r1.recipe.figures import page_state, summarize
from megatron_r1.recipe.hashes import Hashes
from megatron_r1.recipe.lock import Lock
from megatron_r1.recipe.outside import place
from megatron_r1.recipe.plan import Plan, Stage
from megatron_r1.recipe.process import DISK_FULL, SAVED, StageError, run_verb
from megatron_r1.recipe.record import Record, key_of, supersede, write_lineage
from megatron_r1.recipe.services import Services
from megatron_r1.recipe.show import WORDS, duration, print_outcome
from megatron_r1.recipe.standing import Ledger, missing_file
from megatron_r1.recipe.tree import resolve
from megatron_r1.report.recipe_page import render_recipe

SUMMARY = "summary.json"
STAGE_FILE = "stage.toml"
NOTE_SECONDS = 5.0
"""Between notes of how long a stage has run, for one that is killed."""


def run(plan: Plan, choice: Choice) -> dict[str, Any]:
    """Run what is not done; killed and started again, go on where it was.

    Returns:
        See `figures.summarize`. It is written to `<output>/summary.json` once all stages are done.

    Raises:
        ConfigError: no such stage; another run is at work in the output folder.
        DataError: something that a stage reads is not there.
        StageError: a stage or a service failed, or the disk is full.
    """
    try:
        with Lock(plan.output) as lock, Run(plan, choice, lock.descriptor) as running:
            return running.all()
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise StageError(
            f"the disk is full ({error.filename or plan.output}); what was finished is kept: make room, "
            "and the same command goes on from there"
        ) from error


class Run:
    """One run of a plan whose output folder is locked."""

    def __init__(self, plan: Plan, choice: Choice, lock: int) -> None:
        self.plan, self.choice, self.lock = plan, choice, lock
        self.hashes = Hashes(plan.output / Hashes.FILE)
        self.ledger = Ledger(plan, self.hashes)
        self.services = Services(plan.services, plan.output, lock, say)
        self.states = {stage.name: "not run" for stage in plan.stages}

    def __enter__(self) -> "Run":
        self.services.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.services.__exit__(*error)

    def all(self) -> dict[str, Any]:
        """Every stage that was chosen."""
        stages = self.choice.stages(self.plan)
        self._check_needs()
        self._check_files(stages)
        self.plan.save()
        (self.plan.output / SUMMARY).unlink(missing_ok=True)
        if self.choice.anew:
            self._begin_anew()
        try:
            for stage in stages:
                self._stage(stage)
        except BaseException as error:
            self.states |= {
                name: "failed" if isinstance(error, UserError) else "interrupted"
                for name, state in self.states.items()
                if state == "running"
            }
            self._tell()
            raise
        return self._finish()

    def _finish(self) -> dict[str, Any]:
        """All that is done once the last stage is."""
        self.choice.end(self.plan)
        states = self._final_states()
        summary = summarize(self.plan, states)
        if set(states.values()) <= {"ran", "unchanged"}:
            write_json(self.plan.output / SUMMARY, summary)
        self._show(states, summary)
        return summary

    def _check_needs(self) -> None:
        """Of a stage that runs alone."""
        if self.choice.only is None:
            return
        if wrong := self.choice.unfinished(self.plan):
            raise DataError(wrong)
        only = self.plan.stage(self.choice.only)
        standings = self.ledger.standings()
        for name in only.needs:
            if standings[name].state != "done":
                say(f"{name} is out of date, but {only.name} takes its results as they are")

    def _check_files(self, stages: Sequence[Stage]) -> None:
        for stage in stages:
            for text in stage.files:
                if self.hashes.path(place(text)) is None:
                    raise missing_file(stage, text)
        self.hashes.save()

    def _begin_anew(self) -> None:
        """Move the results of `--from` and of what depends on it away, once."""
        if self.choice.goes_on(self.plan):
            say(f"going on with --from {self.choice.anew}, which did not get to its end")
            return
        for stage in self.choice.begins_anew(self.plan):
            if moved := supersede(self.plan, stage.name):
                say(f"{stage.name}: its results were moved to {moved}")
        self.choice.begin(self.plan)

    def _stage(self, stage: Stage) -> None:
        number = self.plan.stages.index(stage) + 1
        title = f"[{number}/{len(self.plan.stages)}] {stage.name} ({stage.verb})"
        standing = self.ledger.standing(stage)
        if standing.state == "done":
            self.states[stage.name] = "unchanged"
            check_promises(self.plan, stage)
            say(f"{title}: unchanged")
            return
        record = standing.record if standing.state == "started" else None
        if record is None:
            made_of = self.ledger.made_of(stage)
            record = Record(stage.name, stage.verb, key_of(made_of), made_of)
        if standing.state == "changed":
            moved = supersede(self.plan, stage.name)
            say(f"{title}: {standing.why}; its earlier results were moved to {moved}")
        resumed = ", goes on where it was" if standing.state == "started" else ""
        say(f"{title}{' <- ' + ', '.join(stage.needs) if stage.needs else ''}{resumed}")
        self.states[stage.name] = "running"
        if not record.ended_well():
            self.services.only(stage.services)
            self._attempt(stage, record)
        write_lineage(self.plan, stage, record, self.hashes)
        self.hashes.save()
        self.states[stage.name] = "ran"
        say(f"{title}: done in {duration(record.seconds)}")
        check_promises(self.plan, stage)

    def _attempt(self, stage: Stage, record: Record) -> None:
        """Run the verb in the stage's folder.

        Raises:
            SystemExit: a signal has asked the recipe or the verb to end; `SAVED` if the verb has saved.
            StageError: the verb failed.
        """
        folder = self.plan.folder(stage)
        folder.mkdir(exist_ok=True)
        config = resolve(stage.config, self.plan.output) | {"output": str(folder)}
        (folder / STAGE_FILE).write_text(tomli_w.dumps(config), encoding="utf-8")
        attempt, begin = record.begin(), time.monotonic()
        record.save(folder)

        def watch() -> None:
            self.services.check()
            elapsed = time.monotonic() - begin
            if elapsed - attempt.seconds > NOTE_SECONDS:
                attempt.seconds = round(elapsed, 3)
                record.save(folder)

        state = "interrupted"
        try:
            code, asked = run_verb(stage.verb, folder / STAGE_FILE, self.lock, self.choice.quiet, watch)
            if not code:
                state = "done" if (folder / stage.final).exists() else "failed"
            elif not asked and code != SAVED:
                state = "failed"
        finally:
            attempt.state, attempt.seconds = state, round(time.monotonic() - begin, 3)
            record.save(folder)
        if asked or code == SAVED:
            sys.exit(code or 128 + asked)
        if code:
            raise StageError(_explain(stage, code, folder))
        if state != "done":
            raise StageError(f"stage {stage.name} ({stage.verb}) ended well, but has written no {stage.final}")

    def _final_states(self) -> dict[str, str]:
        """With how those stages stand that this run has left out, in the words of `status`."""
        standings = self.ledger.standings()
        words = WORDS | {"done": "unchanged"}
        return {
            name: words[standings[name].state] if state == "not run" else state for name, state in self.states.items()
        }

    def _show(self, states: Mapping[str, str], summary: Mapping[str, Any]) -> None:
        seconds = {name: stage["seconds"] for name, stage in summary["stages"].items()}
        print_outcome(self.plan, states, seconds)
        say(f"report: {render_recipe(self.plan.output, page_state(self.plan, summary))}")

    def _tell(self) -> None:
        """How far a run came that did not get to its end; whatever is wrong here must not hide why."""
        try:
            states = self._final_states()
            self._show(states, summarize(self.plan, states))
        except Exception as error:
            say(f"the state of the stages cannot be shown: {type(error).__name__}: {error}")


def say(text: str) -> None:
    """A line about the run, between those of its stages."""
    print(f"\n== {text} ==", file=sys.stderr, flush=True)


def _explain(stage: Stage, code: int, folder: Path) -> str:
    if code == DISK_FULL:
        return (
            f"stage {stage.name} ({stage.verb}): the disk is full; what was finished is kept: make room, and the same "
            "command goes on from there"
        )
    return (
        f"stage {stage.name} ({stage.verb}) ended with exit code {code}; what it said stands above. Its run file is "
        f"{folder / STAGE_FILE}; once mended, the same command goes on from there"
    )
