"""Recipe files: whose key is whose."""

import pytest

from megatron_r1.config.load import validate
from megatron_r1.config.recipe import EvaluationSuite, RecipeConfig, StageSection
from megatron_r1.errors import ConfigError


def test_other_keys_are_the_verbs() -> None:
    section = validate(StageSection, {"verb": "rl", "use": ["a"], "steps": 3, "data": {"task": {}}}, "x")
    assert section.verb == "rl"
    assert section.use == ["a"]
    assert section.own() == {"steps": 3, "data": {"task": {}}}


def test_models_of_an_evaluation_have_keys_of_their_own() -> None:
    tree = {"samples": 4, "models": {"base": {"path": "@base/hf", "samples": 8}}}
    suite = validate(EvaluationSuite, tree, "x")
    assert suite.own() == {"samples": 4}
    assert suite.models["base"].path == "@base/hf"
    assert suite.models["base"].model_extra == {"samples": 8}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "'stages' is missing"),
        ({"stages": {}}, "stages: "),
        ({"stagse": {}}, "unknown key 'stagse', did you mean 'stages'"),
        ({"stages": {"a": {"verb": 3}}}, "stages.a.verb: "),
        ({"services": {"judge": {"command": [], "ready": "x"}}}, "services.judge.command: "),
        ({"services": {"judge": {"command": ["x"]}}}, "'services.judge.ready' is missing"),
        ({"services": {"judge": {"comand": ["x"]}}}, "unknown key 'services.judge.comand'"),
        ({"evaluation": {"models": {}}}, "evaluation.models: "),
        ({"evaluation": {"models": {"a": {}}}}, "'evaluation.models.a.path' is missing"),
    ],
)
def test_refused(tree: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(RecipeConfig, {"output": "out"} | tree, "recipe.toml")
    assert message in str(refused.value)
