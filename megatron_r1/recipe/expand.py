"""From a recipe file to its stages: run files put together and checked by the verbs' own config classes."""

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, RootModel

from megatron_r1.config.load import load, validate
from megatron_r1.config.overlay import merge
from megatron_r1.config.plan import PlanSection
from megatron_r1.config.recipe import EvaluationSuite, OpenSection, RecipeConfig, Tree
from megatron_r1.errors import ConfigError, UserError, nearest
from megatron_r1.recipe.outside import outside_files
from megatron_r1.recipe.plan import Plan, Stage, Verb, evaluation_stage, make_plan
from megatron_r1.recipe.tree import generalize, reference, resolve, texts

FOLDERS = ("logs", "superseded")
"""Names below the output folder that are not stages."""


class RunFile(RootModel[Tree]):
    """A run file of any verb."""


@dataclass(frozen=True)
class Draft:
    """A stage before its run file is put together."""

    place: str
    """Where the recipe file speaks of it."""
    name: str
    verb: str
    section: OpenSection
    keys: Tree
    """The verb's keys, those of the section included."""


def read_recipe(path: Path, overrides: list[str], verbs: Mapping[str, Verb]) -> Plan:
    """Read a recipe and check all that can be checked without running it.

    Args:
        path: the recipe file.
        overrides: as in `config.load.load`; `--stages.r1_zero.steps=10` reaches into a stage.
        verbs: the commands that stages may be.

    Raises:
        ConfigError: an unreadable file; unknown verbs, keys, fragments, services, stages; values that a verb refuses;
            names that are not identifiers; a circle. Mistakes inside stages are reported together.
    """
    return _Expansion(path, validate(RecipeConfig, _laid_over(path, overrides), str(path)), verbs).plan()


def _laid_over(path: Path, overrides: list[str]) -> Tree:
    """A recipe's tree over those that it extends."""
    tree = load(path, overrides, RunFile).root
    seen = {path.name}
    while isinstance(name := tree.pop("extends", None), str):
        if name in seen or Path(name).name != name:
            raise ConfigError(f"{path}: extends = {name!r} has to be another recipe in the same folder")
        seen.add(name)
        tree = merge(load(path.parent / name, [], RunFile).root, tree)
    return tree


class _Expansion:
    def __init__(self, path: Path, config: RecipeConfig, verbs: Mapping[str, Verb]) -> None:
        self.path, self.config, self.verbs = path, config, verbs
        self.output = config.output.absolute()
        self.drafts = {draft.name: draft for draft in self._drafts()}

    def plan(self) -> Plan:
        stages, errors = [], []
        for draft in self.drafts.values():
            try:
                stages.append(self._stage(draft))
            except UserError as error:
                errors.append(f"{self.path}, {draft.place}: {error}")
        if errors:
            raise ConfigError("\n".join(errors))
        return make_plan(self.config, self.output, _evaluations_early(stages, list(self.config.stages)))

    def _drafts(self) -> Iterator[Draft]:
        for name, section in self.config.stages.items():
            _check_name(name, f"{self.path}, [stages.{name}]")
            yield Draft(f"[stages.{name}]", name, section.verb, section, section.own())
        if suite := self.config.evaluation:
            for name in suite.models:
                place = f"[evaluation.models.{name}]"
                _check_name(name, f"{self.path}, {place}")
                if evaluation_stage(name) in self.config.stages:
                    raise ConfigError(
                        f"{self.path}, {place}: it makes the stage {evaluation_stage(name)}, which [stages] has, too; "
                        "give one of them another name"
                    )
                yield Draft(place, evaluation_stage(name), "evaluate", suite, _evaluation_keys(suite, name))

    def _stage(self, draft: Draft) -> Stage:
        verb = self._verb(draft)
        schema: type[BaseModel] = _import(verb.config)
        _check_reserved(draft, schema)
        settings = self._settings(draft, schema)
        reads = list(dict.fromkeys([*texts(settings), *self._service_texts(draft.section.services)]))
        reads = [text for text in reads if reference(text)]
        named = {text: stage for text in reads if (stage := (reference(text) or ("", ""))[0])}
        for where, name in [*named.items(), *(("needs", name) for name in draft.section.needs)]:
            if name not in self.drafts:
                raise ConfigError(f"{where}: no stage {name!r}{nearest(name, self.drafts)}")
        needs = {*named.values(), *draft.section.needs}
        self._check_marked(settings)
        folder = str(self.output / draft.name)
        config = validate(schema, resolve(settings, self.output) | {"output": folder}, where=draft.verb)
        resolved = generalize(config.model_dump(mode="json", exclude_none=True), self.output)
        commands = [self.config.services[name].command for name in draft.section.services]
        return Stage(
            name=draft.name,
            verb=draft.verb,
            final=verb.final,
            settings=settings,
            config={key: value for key, value in resolved.items() if key != "output"},
            needs=[name for name in self.drafts if name in needs],
            reads=reads,
            files=outside_files(config, resolved, commands, self.output),
            services=draft.section.services,
            plan=self._planned(draft.section.plan),
        )

    def _planned(self, own: PlanSection | None) -> PlanSection:
        """[plan], and what a stage says itself over it."""
        given = [
            section.model_dump(exclude_unset=True, exclude={"models"}) for section in (self.config.plan, own) if section
        ]
        return PlanSection(**{key: value for part in given for key, value in part.items()})

    def _verb(self, draft: Draft) -> Verb:
        if not draft.verb:
            others = [name for name, section in self.config.stages.items() if section.verb]
            raise ConfigError(f"`verb` is missing{nearest(draft.name, others)}; a stage needs one of {self._verbs()}")
        if draft.verb not in self.verbs:
            raise ConfigError(f"no verb {draft.verb!r}{nearest(draft.verb, self.verbs)}; there are {self._verbs()}")
        return self.verbs[draft.verb]

    def _verbs(self) -> str:
        return ", ".join(repr(name) for name in self.verbs)

    def _settings(self, draft: Draft, schema: type[BaseModel]) -> Tree:
        """The run file: `file`, the recipe's seed, the fragments, the section's own keys; each over those before."""
        settings: Tree = {}
        if draft.section.file:
            settings = load(self.path.parent / draft.section.file, [], RunFile).root
            settings.pop("output", None)
        if "seed" in schema.model_fields:
            settings = merge(settings, {"seed": self.config.seed})
        for name in draft.section.use:
            if name not in self.config.common:
                raise ConfigError(f"use: no fragment [common.{name}]{nearest(name, self.config.common)}")
            settings = merge(settings, self.config.common[name])
        settings = merge(settings, draft.keys)
        if "output" in settings:
            raise ConfigError(f"`output` is the recipe's to say: it is <output>/{draft.name}; remove the key")
        return settings

    def _service_texts(self, names: list[str]) -> Iterator[str]:
        for name in names:
            if name not in self.config.services:
                raise ConfigError(f"services: no [services.{name}]{nearest(name, self.config.services)}")
            yield from self.config.services[name].command

    def _check_marked(self, settings: Tree) -> None:
        """A result of a stage must be named as such, or the recipe would not know what depends on it."""
        for text in texts(settings):
            path = Path(text) if "/" in text and "\n" not in text else None
            if path is not None and path.absolute().is_relative_to(self.output):
                inside = path.absolute().relative_to(self.output)
                if inside.parts and inside.parts[0] in self.drafts:
                    raise ConfigError(f'{text!r} is a result of the stage {inside.parts[0]}; write "@{inside}"')


def _evaluation_keys(suite: EvaluationSuite, model: str) -> Tree:
    section = suite.models[model]
    return merge(merge(suite.own(), section.model_extra or {}), {"model": {"path": section.path}})


def _check_name(name: str, place: str) -> None:
    if not name.isidentifier() or name in FOLDERS:
        raise ConfigError(
            f"{place}: {name!r} cannot be the name of a stage; letters, digits and '_' can, "
            f"and not {' or '.join(FOLDERS)}"
        )


def _check_reserved(draft: Draft, schema: type[BaseModel]) -> None:
    reserved = type(draft.section).model_fields
    for key in draft.section.model_fields_set & set(schema.model_fields) & set(reserved):
        raise ConfigError(
            f"`{key}` is the recipe's key here, but {draft.verb!r} has one of that name, too; "
            f"set the verb's in a fragment, [common.NAME], and `use` that"
        )


def _evaluations_early(stages: list[Stage], written: list[str]) -> list[Stage]:
    """Each evaluation right after the last stage that it needs, so that its figures are there early."""
    places = {name: place for place, name in enumerate(written)}

    def place(stage: Stage) -> tuple[int, bool]:
        if stage.name in places:
            return places[stage.name], False
        return max((places.get(name, -1) for name in stage.needs), default=-1), True

    return sorted(stages, key=place)


def _import(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
