"""A run that cannot learn says so at once."""

from pathlib import Path

from megatron_r1.config.sections import ReportSection
from megatron_r1.report.run import Report
from megatron_r1.train.rl import warn_of_nothing_to_learn
from megatron_r1.types import Group, Question, Sample


def log(folder: Path, rewards: list[dict[str, float | None]], idle: float, step: int) -> str:
    samples = [Sample([1], [0.0], "", True, 0, rewards=parts) for parts in rewards]
    with Report(folder, ReportSection(console=False, tensorboard=False), "test", 10, "") as report:
        warn_of_nothing_to_learn(report, [Group(Question("q", "t", "?", "!"), [1], samples)], idle, step)
    return (folder / "run.log").read_text()


def test_a_constant_reward_is_named_with_its_value(tmp_path: Path) -> None:
    said = log(tmp_path, [{"accuracy": 0.0, "format": 1.0}, {"accuracy": 0.0, "format": 0.0}], idle=0.0, step=0)
    assert "reward 'accuracy' is 0 for all 2 samples of step 0" in said
    assert "format" not in said
    assert "advantages" not in said


def test_rewards_that_do_not_apply_are_not_constant(tmp_path: Path) -> None:
    assert "warning" not in log(tmp_path, [{"a": None, "b": 1.0}, {"a": None, "b": 0.5}], idle=0.5, step=0)


def test_advantages_that_are_all_zero(tmp_path: Path) -> None:
    assert "all advantages of step 2 are zero" in log(tmp_path, [{"a": 1.0}, {"a": 0.0}], idle=1.0, step=2)


def test_a_reward_that_has_been_learned_is_no_mistake(tmp_path: Path) -> None:
    assert "warning" not in log(tmp_path, [{"a": 1.0}, {"a": 1.0}], idle=1.0, step=7)
