import json
import subprocess
import sys

import pytest

from megatron_r1.report.run import Report
from megatron_r1.types import Group


def rows(report: Report, file: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (report.output / file).read_text().splitlines()]


def train(report: Report, steps: range) -> None:
    """A loop whose figures depend on the step alone; it evaluates before every second step."""
    for step in steps:
        if step % 2 == 0:
            report.evaluation(step, {"heldout_accuracy": step / 10})
        with report.step(step), report.phase("update"):
            report.add({"loss": 1.0 / (step + 1)})


def train_until_killed(unopened: Report, group: Group) -> None:
    with unopened as report:
        train(report, range(5))
        report.samples(5, [group], "train")
        with report.step(5):
            report.add({"loss": 3.0})
            raise KeyboardInterrupt


def without_times(found: list[dict]) -> list[dict]:
    times = ("elapsed", "seconds", "seconds/update")
    return [{name: value for name, value in row.items() if name not in times} for row in found]


def test_a_step_is_one_line_with_one_number_a_metric(open_report):
    with open_report() as report, report.step(0):
        report.add({"loss": 1.0, "sum/tokens": 10, "logprob_difference_max": 0.5})
        report.add({"loss": 2.0, "sum/tokens": 30, "logprob_difference_max": 0.25})
        report.set({"lr": 1e-3})
        report.set({"lr": 2e-3})
        with report.phase("rollout"):
            pass
    (row,) = rows(report)
    assert row["kind"] == "step"
    assert row["step"] == 0
    assert {name: row[name] for name in ("loss", "tokens", "logprob_difference_max", "lr")} == {
        "loss": 1.5,
        "tokens": 40.0,
        "logprob_difference_max": 0.5,
        "lr": 2e-3,
    }
    assert 0 <= row["seconds/rollout"] <= row["seconds"] <= row["elapsed"]


def test_a_metric_belongs_to_its_step_only(open_report):
    with open_report() as report:
        with report.step(0):
            report.add({"kl": 1.0})
        with report.step(1):
            report.add({"loss": 1.0})
    assert "kl" not in rows(report)[1]


def test_numbers_that_json_lacks_become_null(open_report):
    with open_report() as report, report.step(0):
        report.add({"loss": float("nan"), "grad_norm": float("inf"), "kl": 1.0})
    text = (report.output / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=pytest.fail)
    assert row["loss"] is None
    assert row["grad_norm"] is None
    assert row["kl"] == 1.0


@pytest.mark.parametrize("name", ["step", "elapsed", "seconds/rollout", "sum/seconds"])
def test_the_reports_own_names_are_refused(open_report, name):
    with open_report() as report, pytest.raises(ValueError, match="cannot be called"):
        report.add({name: 1.0})


def test_a_resumed_run_leaves_the_metrics_of_an_undisturbed_one(open_report, group, tmp_path):
    with open_report(tmp_path / "undisturbed") as undisturbed:
        train(undisturbed, range(6))
        undisturbed.samples(6, [group("done")], "after")

    with pytest.raises(KeyboardInterrupt):
        train_until_killed(open_report(tmp_path / "killed"), group("early"))
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')  # the line that the kill cut short

    with open_report(tmp_path / "killed", resume_step=3) as resumed:
        assert [row["step"] for row in rows(resumed) if row["kind"] == "step"] == [0, 1, 2]
        train(resumed, range(3, 6))
        resumed.samples(6, [group("done")], "after")

    assert without_times(rows(resumed)) == without_times(rows(undisturbed))
    assert rows(resumed, "samples.jsonl") == rows(undisturbed, "samples.jsonl")
    elapsed = [row["elapsed"] for row in rows(resumed)]
    assert elapsed == sorted(elapsed)


def test_starting_again_from_the_beginning_forgets_the_earlier_run(open_report):
    for _ in range(2):
        with open_report() as report:
            assert not (report.output / "summary.json").exists()
            train(report, range(2))
            assert report.summary({"loss_final": 0.5}) == json.loads((report.output / "summary.json").read_text())
    assert [row["step"] for row in rows(report) if row["kind"] == "step"] == [0, 1]


def test_a_step_that_fails_is_not_recorded(open_report, group):
    report = open_report()
    with pytest.raises(KeyboardInterrupt):
        train_until_killed(report, group("x"))
    assert [row["step"] for row in rows(report) if row["kind"] == "step"] == [0, 1, 2, 3, 4]
    assert (report.output / "report.html").exists()


def test_time_outside_steps_is_recorded_by_phase(open_report):
    with open_report() as report:
        with report.phase("start engines"):
            pass
        train(report, range(1))
    assert (rows(report)[0]["kind"], rows(report)[0]["phase"]) == ("phase", "start engines")


def test_the_config_and_the_log_lie_beside_the_metrics(open_report):
    with open_report() as report:
        report.message("checkpoint saved")
        train(report, range(2))
    assert "lr = 0.001" in (report.output / "config.toml").read_text()
    log = (report.output / "run.log").read_text().splitlines()
    assert "checkpoint saved" in log
    assert any(line.startswith("step 2/6  loss  0.500") for line in log)


def test_samples_keep_the_text_and_the_rewards(open_report, group):
    with open_report() as report:
        report.samples(0, [group("<think>3 + 4 = 7</think>\n\ud800", reward=0.5)], "before")
    (row,) = rows(report, "samples.jsonl")
    assert (row["tag"], row["question_id"], row["answer"]) == ("before", "q-1", "7")
    assert row["responses"][0]["text"] == "<think>3 + 4 = 7</think>\n?"
    assert row["responses"][0]["rewards"] == {"accuracy": 0.5, "language": None}
    assert row["responses"][0]["tokens"] == 2


def test_other_ranks_write_nothing(open_report, group):
    with open_report(enabled=False) as report:
        train(report, range(2))
        report.samples(0, [group("x")], "before")
        assert report.summary({"x": 1}) == {"x": 1}
    assert not report.output.exists()


def test_no_torch_is_needed():
    code = (
        "import sys, megatron_r1.report.run; sys.exit(any(n in sys.modules for n in ('torch', 'wandb', 'tensorboard')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
