import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_r1.errors import DataError
from megatron_r1.report.html import render

HOSTILE = '<think>ok</think><script>alert("x")</script><img src=x onerror=alert(1)></pre></textarea> & "quotes"'


class Page(HTMLParser):
    """Tags with their attributes, text outside scripts, and the content of each script."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data


@pytest.fixture
def page(open_report, group) -> Page:
    with open_report(steps=2) as report:
        report.samples(0, [group(HOSTILE), group("no", name="q-2", prompt="User: 9 - 5? Assistant:")], "before")
        report.evaluation(0, {"heldout_accuracy": 0.1})
        for step in range(2):
            with report.step(step), report.phase("</script><b>"):
                report.add({"reward": step, "</script><script>": 1.0})
        report.evaluation(2, {"heldout_accuracy": 0.9})
        report.samples(2, [group("after text")], "after")
        report.summary({"heldout_accuracy_final": 0.9, "note": "<i>"})
    return Page(report.output / "report.html")


def test_it_loads_nothing(page):
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "object", "embed", "base", "audio", "video")
        for name in ("src", "srcset", "action", "poster", "data"):
            assert name not in attributes
        assert attributes.get("href", "data:,") == "data:,"
    policies = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies[0].startswith("default-src 'none';")
    assert "http" not in policies[0]


def test_what_a_model_wrote_is_text(page):
    assert HOSTILE in page.text
    assert not [tag for tag, _ in page.tags if tag in ("img", "textarea", "b", "think")]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert len(page.scripts) == 3  # data, plotly.js, the drawing


def test_its_data_are_the_runs_data(page):
    charts = json.loads(page.scripts[0])
    traces = {trace["name"]: trace for chart in charts for trace in chart["traces"]}
    assert traces["Reward"]["y"] == [0.0, 1.0]
    assert traces["Held-out accuracy"]["x"] == [0, 2]
    assert traces["Held-out accuracy"]["y"] == [0.1, 0.9]
    assert "</script><script>" in traces
    drawn = {chart["id"] for chart in charts}
    assert drawn <= {attributes.get("id") for _, attributes in page.tags}


def test_samples_stand_side_by_side_under_their_question(page):
    columns = [a["class"] for tag, a in page.tags if tag == "div" and (a.get("class") or "").startswith("columns")]
    assert columns == ["columns", "columns single"]
    for text in ("3 + 4?", "before · step 0", "after · step 2", "after text", "accuracy 1", "language n/a", "10.0 %"):
        assert text in page.text


def test_config_and_summary_are_in_it(page):
    for text in ('name = "<b>&"', "heldout_accuracy_final", "<i>"):
        assert text in page.text


def test_a_template_is_not_shown_as_the_question(open_report, group):
    template = "You think in <think> tags.\nUser: {}\nAssistant:"
    questions = ["What is 12 + 3?", "What is 15 - 3?"]
    groups = [group("x", name=question, prompt=template.format(question)) for question in questions]
    with open_report() as report:
        report.samples(0, groups, "train")
    text = (report.output / "report.html").read_text()
    for question in questions:
        assert f'<p class="question">{question}</p>' in text


def test_the_files_alone_are_enough_to_render_again(open_report):
    with open_report() as report, report.step(0):
        report.add({"loss": 1.0})
    first = (report.output / "report.html").read_text()
    (report.output / "report.html").unlink()
    assert render(report.output).read_text() == first


def test_an_empty_run_directory_renders(tmp_path):
    assert "0 steps" in Page(render(tmp_path)).text


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("nonsense\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 1"):
        render(tmp_path)
