"""Run files: what is read, what is refused, and what the refusal says."""

import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from megatron_r1.config.load import dump, load
from megatron_r1.config.runs import PretrainConfig, RLConfig
from megatron_r1.errors import ConfigError


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides, RLConfig)
    return str(caught.value)


def test_values_and_defaults(rl_file: Path) -> None:
    config = load(rl_file, [], RLConfig)
    assert (config.steps, config.optim.lr, config.model.path) == (3, 1e-4, Path("model"))
    assert (config.group_size, config.reference.refresh_every, config.rollout.temperature) == (4, 25, 1.0)


def test_a_config_is_frozen(rl_file: Path) -> None:
    config = load(rl_file, [], RLConfig)
    with pytest.raises(ValidationError, match="frozen"):
        config.steps = 4  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("--steps=7", lambda config: config.steps == 7),
        ("--optim.lr=2e-5", lambda config: config.optim.lr == 2e-5),
        ("--optim.lr=1", lambda config: config.optim.lr == 1.0),
        ("--output=runs/other", lambda config: config.output == Path("runs/other")),
        ('--output="runs/a b"', lambda config: config.output == Path("runs/a b")),
        ("--report.console=false", lambda config: config.report.console is False),
        ("--report.wandb=offline", lambda config: config.report.wandb == "offline"),
        ('--rollout.arguments=["--seed=1", "-v"]', lambda config: config.rollout.arguments == ["--seed=1", "-v"]),
        ("--loss.clip_eps=0.3", lambda config: config.loss["clip_eps"] == 0.3),
        ("--rewards.format.type=format", lambda config: config.rewards["format"]["type"] == "format"),
        ("--data.task.options={min_terms = 3}", lambda config: config.data.task["options"] == {"min_terms": 3}),
        ("--report.wandb_project=a=b", lambda config: config.report.wandb_project == "a=b"),
    ],
)
def test_override(rl_file: Path, override: str, read: object) -> None:
    assert callable(read)
    assert read(load(rl_file, [override], RLConfig))


def test_the_last_override_wins(rl_file: Path) -> None:
    assert load(rl_file, ["--steps=7", "--steps=8"], RLConfig).steps == 8


@pytest.mark.parametrize("override", ["steps=7", "--steps", "--=7", "-steps=7", "seven"])
def test_malformed_override(rl_file: Path, override: str) -> None:
    message = refusal(rl_file, override)
    assert override in message
    assert "--section.key=value" in message


@pytest.mark.parametrize("override", ["--steps.x=7", "--optim..lr=1.0", "--optim.=1.0"])
def test_override_of_what_is_not_there(rl_file: Path, override: str) -> None:
    refusal(rl_file, override)


def test_an_override_cannot_smuggle_in_other_keys(rl_file: Path) -> None:
    refusal(rl_file, "--steps=7\nseed = 3")


@pytest.mark.parametrize(
    ("override", "unknown", "near"),
    [
        ("--stps=7", "stps", "steps"),
        ("--optim.learning_rat=1", "optim.learning_rat", None),
        ("--optim.warmup_step=1", "optim.warmup_step", "warmup_steps"),
        ("--rollout.max_token=1", "rollout.max_token", "max_tokens"),
        ("--optmi.lr=1.0", "optmi", "optim"),
        ("--zzzzzz=1", "zzzzzz", None),
    ],
)
def test_unknown_key_names_the_nearest(rl_file: Path, override: str, unknown: str, near: str | None) -> None:
    message = refusal(rl_file, override)
    assert f"unknown key {unknown!r}" in message
    assert (f"did you mean {near!r}" in message) if near else ("did you mean 'lr'" not in message)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("--steps=many", "steps"),
        ("--steps=1.5", "steps"),
        ("--steps=0", "steps"),
        ("--steps=-3", "steps"),
        ("--optim.lr=fast", "optim.lr"),
        ("--optim=3", "optim"),
        ("--optim.beta1=1.5", "optim.beta1"),
        ("--model.dtype=float64", "model.dtype"),
        ("--rollout.arguments=1", "rollout.arguments"),
        ("--optim.beta1=1.0", "optim.beta1"),
        ("--optim.lr=nan", "optim.lr"),
        ("--optim.lr=inf", "optim.lr"),
        ("--steps=true", "steps"),
        ('--steps="7"', "steps"),
        ("--report.console=1", "report.console"),
    ],
)
def test_wrong_type_or_value(rl_file: Path, override: str, key: str) -> None:
    assert f"{key}: " in refusal(rl_file, override)


def test_every_mistake_is_listed(rl_file: Path) -> None:
    message = refusal(rl_file, "--steps=many", "--optim.lr=fast", "--sed=1")
    assert all(part in message for part in ("steps", "optim.lr", "'sed'", "'seed'", str(rl_file)))


def test_group_size_of_one(rl_file: Path) -> None:
    assert "group_size 1" in refusal(rl_file, "--group_size=1")


def test_minibatches_show_the_arithmetic(rl_file: Path) -> None:
    assert "4 questions x 4 samples = 16 do not divide into 3 minibatches" in refusal(rl_file, "--minibatches=3")


def test_cross_key_checks(rl_file: Path) -> None:
    assert "min_lr 1 is above lr 0.0001" in refusal(rl_file, "--optim.min_lr=1.0")
    assert "max_tokens 64 leaves no room" in refusal(rl_file, "--rollout.max_tokens=64")
    growing = "--rollout.max_tokens=[{ value = 8, until_step = 2 }, { value = 64 }]"
    assert "max_tokens 64 leaves no room" in refusal(rl_file, growing)
    silent = '--data.task={ type = "tests.config.silent:Silent" }'
    assert "[rewards] is empty, and the task of [data] names no" in refusal(rl_file, "--rewards={}", silent)


def test_rewards_default_to_those_of_the_task(rl_file: Path) -> None:
    config = load(rl_file, ["--rewards={}"], RLConfig)
    assert {name: section["type"] for name, section in config.rewards.items()} == {"task": "task", "format": "format"}
    assert config.rewards["task"]["partial_credit"] is False


def test_each_task_is_scored_by_its_own_defaults(rl_file: Path) -> None:
    config = load(rl_file, ["--rewards={}", '--heldout.task={ type = "human_eval" }'], RLConfig)
    assert set(config.rewards) == {"task", "code", "format"}
    assert (config.data.rewards, config.heldout.rewards) == (["task", "format"], ["code", "format"])
    assert load(rl_file, [], RLConfig).heldout.rewards is None


def test_a_section_names_rewards_that_exist(rl_file: Path) -> None:
    assert load(rl_file, ['--heldout.rewards=["accuracy"]'], RLConfig).heldout.rewards == ["accuracy"]
    wrong = "of a member names 'acuracy', did you mean 'accuracy'?, which [rewards] does not have; it has accuracy"
    assert wrong in refusal(rl_file, '--heldout.rewards=["acuracy"]')
    member = 'type = "reasoning_gym", dataset = "chain_sum", rewards = ["acuracy"]'
    assert wrong in refusal(rl_file, f'--data.task={{ type = "mixture", tasks = {{ sums = {{ {member} }} }} }}')


def test_a_mixture_whose_template_nobody_knows(rl_file: Path) -> None:
    member = 'type = "reasoning_gym", dataset = "chain_sum", template = "r1_zer"'
    message = refusal(rl_file, f'--data.task={{ type = "mixture", tasks = {{ sums = {{ {member} }} }} }}')
    assert "template 'r1_zer' is neither a known name, did you mean 'r1_zero'" in message


def test_what_only_a_task_or_a_reward_can_refuse(rl_file: Path) -> None:
    assert "data.task: Input should be an object" in refusal(rl_file, '--data.task="math"', "--rewards={}")
    assert "weight" in refusal(rl_file, "--rewards.accuracy.weight=nan")
    assert "weight" in refusal(rl_file, '--rewards.accuracy.weight="0.5"')
    assert load(rl_file, [], RLConfig).rewards["accuracy"]["weight"] == 1.0
    assert "belongs at the top" in refusal(rl_file, "--optim.steps=3")


def test_missing_key(rl_file: Path) -> None:
    rl_file.write_text(rl_file.read_text().replace("lr = 1e-4", ""))
    assert "'optim.lr' is missing" in refusal(rl_file)


def test_missing_file(tmp_path: Path) -> None:
    message = refusal(tmp_path / "none.toml")
    assert "none.toml" in message
    assert "No such file" in message


def test_folder_instead_of_file(tmp_path: Path) -> None:
    assert str(tmp_path) in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "\n  \n"])
def test_empty_file(rl_file: Path, text: str) -> None:
    rl_file.write_text(text)
    assert "is empty" in refusal(rl_file)


@pytest.mark.parametrize("text", ["steps = ", "[optim\nlr = 1", "steps = 1\nsteps = 2"])
def test_malformed_file(rl_file: Path, text: str) -> None:
    rl_file.write_text(text)
    assert "not valid TOML" in refusal(rl_file)


def test_binary_file(rl_file: Path) -> None:
    rl_file.write_bytes(b"\xff\xfe\x00steps")
    assert str(rl_file) in refusal(rl_file)


def test_dump_loads_back_to_the_same_config(rl_file: Path, tmp_path: Path) -> None:
    config = load(rl_file, ["--optim.lr=3e-6", "--evaluation.every=5", '--output="a \\"b\\" ü"'], RLConfig)
    again = tmp_path / "again.toml"
    again.write_text(dump(config))
    assert load(again, [], RLConfig) == config
    assert tomllib.loads(again.read_text())["optim"]["beta2"] == 0.95


def test_the_schema_of_another_verb_is_not_accepted(rl_file: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key 'group_size'"):
        load(rl_file, [], PretrainConfig)
