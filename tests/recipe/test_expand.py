"""From a recipe file to stages: order, run files, and every mistake found before anything runs."""

from collections.abc import Callable
from typing import Any

import pytest

from megatron_r1.cli import VERBS, _import
from megatron_r1.config.recipe import EvaluationSuite, StageSection
from megatron_r1.errors import ConfigError
from megatron_r1.recipe.expand import read_recipe
from megatron_r1.recipe.plan import Plan
from tests.recipe.conftest import Recipe

SUMS = {"type": "reasoning_gym", "dataset": "chain_sum"}
QUICK = ("data generate", "data index", "data decontaminate", "tokenizer train", "evaluate")


@pytest.fixture
def plan(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """The plan of the recipe as it is now, made in its folder."""
    monkeypatch.chdir(recipe.folder)
    return lambda *overrides: read_recipe(recipe.write(), list(overrides), VERBS)


def names(plan: Plan) -> list[str]:
    return [stage.name for stage in plan.stages]


def test_stages_come_after_what_they_read(recipe: Recipe, plan: Callable[..., Plan]) -> None:
    recipe.tree["stages"] = dict(reversed(recipe.tree["stages"].items()))
    assert names(plan()) == ["first", "second", "third"]
    assert [stage.needs for stage in plan().stages] == [[], ["first"], ["second"]]


def test_the_file_breaks_ties(recipe: Recipe, plan: Callable[..., Plan]) -> None:
    first = recipe.tree["stages"]["first"]
    recipe.tree["stages"] = {"z": first, "b": first | {"needs": ["y"]}, "a": first, "y": first}
    assert names(plan()) == ["z", "a", "y", "b"]
    assert plan().depending_on("y") == [plan().stage("y"), plan().stage("b")]


def test_layers_of_a_run_file(recipe: Recipe, plan: Callable[..., Plan]) -> None:
    """The file, the recipe's seed, fragments in order, the stage's keys, overrides."""
    (recipe.folder / "base.toml").write_text(
        "output = 'elsewhere'\nseed = 1\ndocuments = 1\nvalidation_documents = 1\n[quality]\ncareful = 1.0\n"
        "[task]\ntype = 'mixture'\ntasks = {}\n"
    )
    recipe.tree["common"] |= {"a": {"documents": 2, "template": "one"}, "b": {"template": "two", "task": SUMS}}
    recipe.tree["stages"]["corpus"] = {
        "verb": "data generate", "file": "base.toml", "use": ["a", "b"], "validation_documents": 5,
    }  # fmt: skip
    settings = plan("--seed=9", "--stages.corpus.validation_documents=6").stage("corpus").settings
    assert settings == {
        "seed": 9,
        "documents": 2,
        "validation_documents": 6,
        "template": "two",
        "quality": {"careful": 1.0},
        "task": SUMS,
    }
    recipe.tree["stages"]["corpus"]["seed"] = 4
    assert plan("--seed=9").stage("corpus").settings["seed"] == 4
    assert "seed" not in plan().stage("first").settings


def test_evaluations(recipe: Recipe, plan: Callable[..., Plan]) -> None:
    """One a model, each right after what it needs, the model's keys over those of the suite."""
    recipe.tree["evaluation"] = {
        "samples": 2,
        "rollout": {"max_model_len": 64, "max_tokens": 32},
        "tasks": {"sums": {"task": SUMS, "questions": 4}},
        "models": {
            "outside": {"path": "model"},
            "third": {"path": "@third/hf"},
            "second": {"path": "@second/hf", "rollout": {"max_tokens": 8}},
        },
        "figures": {"accuracy": "tasks.sums.pass@1"},
    }
    made = plan()
    assert names(made) == ["evaluate_outside", "first", "second", "evaluate_second", "third", "evaluate_third"]
    assert made.stage("evaluate_second").config["model"]["path"] == "@second/hf"
    assert made.stage("evaluate_second").config["rollout"]["max_tokens"] == 8
    assert made.stage("evaluate_third").config["rollout"]["max_tokens"] == 32
    assert made.stage("evaluate_outside").files == ["model"]
    assert made.models["third"] == "evaluate_third"
    recipe.tree["stages"]["evaluate_third"] = recipe.tree["stages"]["first"]
    with pytest.raises(ConfigError, match=r"evaluation.models.third\]: it makes the stage evaluate_third"):
        plan()


def test_files_from_outside(recipe: Recipe, plan: Callable[..., Plan]) -> None:
    """Data that has to exist, code and folders that do; not words that happen to be folders."""
    (recipe.folder / "reward.py").write_text("")
    (recipe.folder / "r1_zero").mkdir()
    (recipe.folder / "rows").mkdir()
    (recipe.folder / "models/judge").mkdir(parents=True)
    (recipe.folder / "models/judge/config.json").write_text("{}")
    command = ["python", "reward.py", "@first/kept.jsonl", "models/judge", ".", "r1_zero"]
    recipe.tree["services"] = {"judge": {"command": command, "ready": "http://x"}}
    second = recipe.tree["stages"]["second"]
    second["services"] = ["judge"]
    second["data"] = {"source": "./rows"}
    recipe.tree["stages"]["third"]["data"] = {"source": "nowhere/x.jsonl", "columns": {"text": "rows"}}
    made = plan()
    assert made.stage("second").files == ["./rows", "exam.jsonl", "models/judge", "reward.py"]
    assert made.stage("second").needs == ["first"]
    assert made.stage("third").files == ["exam.jsonl", "nowhere/x.jsonl"]


def test_a_tilde_that_is_nobodys_home(recipe: Recipe, plan: Callable[..., Plan]) -> None:
    """Text that a file system would not take for a home folder is text."""
    recipe.tree["services"] = {"judge": {"command": ["python", "-c", "~~~. end"], "ready": "http://x"}}
    recipe.tree["stages"]["second"]["services"] = ["judge"]
    assert plan().stage("second").files == ["exam.jsonl"]


def test_a_plan_is_read_as_it_was_saved(recipe: Recipe, plan: Callable[..., Plan]) -> None:
    made = plan()
    made.save()
    assert Plan.read(recipe.output) == made
    moved = recipe.folder / "moved"
    recipe.output.rename(moved)
    assert Plan.read(moved) == made.model_copy(update={"output": moved})


def wrong(stage: str = "second", **keys: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda tree: tree["stages"].setdefault(stage, {}).update(keys)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (wrong(data={"source": "@frist/kept.jsonl"}), ["@frist/kept.jsonl: no stage 'frist', did you mean 'first'"]),
        (wrong(needs=["thirt"]), ["needs: no stage 'thirt', did you mean 'third'"]),
        (wrong(verb="data decontamine"), ["no verb 'data decontamine', did you mean 'data decontaminate'"]),
        (wrong("secnod", ngram=3), ["`verb` is missing, did you mean 'second'"]),
        (wrong(ngrams=3), ["[stages.second]: data decontaminate: unknown key 'ngrams', did you mean 'ngram'"]),
        (wrong(ngram="3"), ["[stages.second]", "ngram: "]),
        (wrong(use=["exams"]), ["no fragment [common.exams], did you mean 'exam'"]),
        (wrong(services=["judge"]), ["no [services.judge]"]),
        (wrong(output="x"), ["`output` is the recipe's to say: it is <output>/second"]),
        (wrong(file="none.toml"), ["none.toml", "No such file"]),
        (wrong(needs=["third"]), ["second -> third -> second", "second needs third", "third needs second"]),
        (wrong(needs=["second"]), ["second -> second"]),
        (wrong(data={"source": "@first/../x.jsonl"}), ["leaves the folder of the stage 'first'"]),
        (wrong(data={"source": "out/first/kept.jsonl"}), ["result of the stage first", 'write "@first/kept.jsonl"']),
        (wrong("second-b", verb="data index"), ["'second-b' cannot be the name of a stage"]),
        (wrong("logs", verb="data index"), ["'logs' cannot be the name of a stage"]),
        (wrong(ngram=0), ["[stages.second]", "ngram"]),
    ],
)  # fmt: skip
def test_mistakes(recipe: Recipe, plan: Callable[..., Plan], change: Callable[..., Any], parts: list[str]) -> None:
    change(recipe.tree)
    with pytest.raises(ConfigError) as refused:
        plan()
    assert [part for part in parts if part not in str(refused.value)] == []
    assert not recipe.output.exists()


def test_mistakes_of_several_stages_are_told_together(recipe: Recipe, plan: Callable[..., Plan]) -> None:
    recipe.tree["stages"]["first"]["ngrams"] = recipe.tree["stages"]["third"]["txet"] = 3
    with pytest.raises(ConfigError, match=r"(?s)stages.first\].*'ngram'.*\n.*stages.third\].*'text'"):
        plan()


def test_no_stage_of_that_name(plan: Callable[..., Plan]) -> None:
    with pytest.raises(ConfigError, match=r"no stage 'thrid', did you mean 'third'\?; there are first, second, third"):
        plan().stage("thrid")


@pytest.mark.parametrize("verb", QUICK)
def test_no_verb_has_a_key_of_the_recipes(verb: str) -> None:
    """Were there one, a stage could set it only through a fragment."""
    section = EvaluationSuite if verb == "evaluate" else StageSection
    assert not set(section.model_fields) & set(_import(VERBS[verb].config).model_fields)


def test_a_key_of_both_is_refused(recipe: Recipe, plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    (recipe.folder / "own_verb.py").write_text(
        "from pathlib import Path\nfrom megatron_r1.config.section import Section\n"
        "class Config(Section):\n    output: Path\n    file: str = ''\n"
    )
    monkeypatch.syspath_prepend(recipe.folder)
    verb = type("Verb", (), {"config": "own_verb:Config", "final": "summary.json"})
    monkeypatch.setitem(VERBS, "own", verb)
    recipe.tree["common"]["named"] = {"file": "theirs"}
    recipe.tree["stages"]["first"] = {"verb": "own", "use": ["named"]}
    assert plan().stage("first").settings == {"file": "theirs"}
    recipe.tree["stages"]["first"]["file"] = "x.toml"
    with pytest.raises(ConfigError, match="`file` is the recipe's key here"):
        plan()
