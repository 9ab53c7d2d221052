import io
import re

from rich.console import Console

from megatron_r1.report.console import Panel, open_display, phase_bar, sparkline

FIGURES = {"reward": 1.25, "accuracy": 0.5, "kl": 1.2e-3, "tokens_per_second": 1234.0, "unlisted": 3.0}


def test_without_a_terminal_a_step_is_one_plain_aligned_line():
    stream = io.StringIO()
    display = open_display(stream, "A run", 200)
    display.step(8, FIGURES, {}, 12.3)
    display.message("checkpoint saved")
    display.step(99, {**FIGURES, "reward": -0.5, "accuracy": 1.0}, {}, 2.0)
    display.close()
    title, first, message, second = stream.getvalue().splitlines()
    assert title == "A run: 200 steps"
    assert message == "checkpoint saved"
    assert first.startswith("step   9/200  reward  1.250  acc 50.0 %  kl 1.20e-03  tok/s  1,234  12.3 s  left ")
    assert second.startswith("step 100/200  reward -0.500  acc 100.0 %  kl")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", stream.getvalue())


def test_the_console_goes_to_standard_error(open_report, capsys):
    with open_report(section={"console": True}) as report, report.step(0):
        report.add({"loss": 0.25})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "step 1/6  loss  0.250" in captured.err


def test_console_false_is_silent(open_report, capsys):
    with open_report() as report, report.step(0):
        report.message("unseen")
    assert capsys.readouterr() == ("", "")


def test_the_live_panel_shows_progress_metrics_and_phases():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, height=40, color_system=None)
    panel = Panel(console, "A [run]", 10)
    panel.begin(0, "rollout")
    panel.step(0, FIGURES, {"rollout": 3.0, "update": 1.0}, 4.0)
    panel.step(1, {**FIGURES, "reward": 1.75}, {"rollout": 3.0, "update": 1.0}, 4.0)
    panel.message("checkpoint [saved]")
    panel.close()
    shown = stream.getvalue()
    for text in ("A [run]", "2/10", "1.250", "1.750", "50.0 %", "rollout 75 %", "update 25 %", "checkpoint [saved]"):
        assert text in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor comes back


def test_sparkline():
    assert sparkline([0.0, 1.0, 0.5]) == "▁█▅"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([float("nan")]) == ""


def test_phase_bar_is_as_wide_as_told():
    bar, legend = phase_bar({"rollout": 30.0, "update": 10.0}, width=40).plain.split("\n")
    assert bar == "━" * 40
    assert "rollout 75 %" in legend
