"""Recipes as processes: what runs, what does not run again, what is kept, what is recorded."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from megatron_r1 import __version__
from tests.recipe.conftest import SHARED, Recipe

EXAM = "exam.jsonl"


def sha256(path: Path) -> str:
    return subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]


def made(recipe: Recipe) -> dict[str, tuple[int, int]]:
    """Inode and time of the file that each stage writes last: another run of it would leave another one."""
    files = {path.parent.name: path.stat() for path in recipe.output.glob("*/summary.json")}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in files.items()}


def superseded(recipe: Recipe) -> list[str]:
    return sorted(path.name for path in recipe.output.glob("superseded/*"))


def test_a_whole_recipe_then_nothing_then_what_changed(recipe: Recipe) -> None:
    done = recipe.run("--json")
    figures = json.loads(done.stdout)
    assert figures == recipe.read("summary.json")
    stages = figures["stages"]
    assert list(stages) == ["first", "second", "third"]
    assert {(stage["verb"], stage["state"]) for stage in stages.values()} == {("data decontaminate", "ran")}
    assert [line for line in done.stderr.splitlines() if line.startswith("== [") and "done" not in line] == [
        "== [1/3] first (data decontaminate) ==",
        "== [2/3] second (data decontaminate) <- first ==",
        "== [3/3] third (data decontaminate) <- second ==",
    ]
    before = made(recipe)
    assert set(recipe.ran().values()) == {"unchanged"}
    assert made(recipe) == before
    # Another n-gram that keeps the same rows: the stage runs, those after it do not.
    recipe.tree["stages"]["first"]["ngram"] = 9
    assert recipe.states() == {"first": "done", "second": "done", "third": "done"}, "that of the last run"
    done = recipe.run()
    assert "first (data decontaminate): ngram: None -> 9; its earlier results were moved to" in done.stderr
    after = made(recipe)
    assert after["first"] != before["first"]
    assert {name: after[name] for name in ("second", "third")} == {name: before[name] for name in ("second", "third")}
    assert superseded(recipe) == ["first-1"]
    # One that keeps a row more: all that read it run, directly or not.
    recipe.tree["stages"]["first"]["ngram"] = recipe.tree["stages"]["second"]["ngram"] = 11
    assert recipe.ran() == {"first": "ran", "second": "ran", "third": "ran"}
    assert superseded(recipe) == ["first-1", "first-2", "second-1", "third-1"]
    assert SHARED not in (recipe.output / "superseded/first-2/kept.jsonl").read_text()
    assert SHARED in (recipe.output / "first/kept.jsonl").read_text()


def test_lineage(recipe: Recipe) -> None:
    recipe.run()
    lineage = recipe.read("second/lineage.json")
    kept = recipe.output / "first/kept.jsonl"
    assert lineage["inputs"] == {"first": {"kept.jsonl": sha256(kept)}}
    assert lineage["files"] == {EXAM: sha256(recipe.folder / EXAM)}
    folder = recipe.output / "second"
    names = ("dropped.jsonl", "kept.jsonl", "summary.json")
    assert lineage["outputs"] == {
        name: {"sha256": sha256(folder / name), "size": (folder / name).stat().st_size} for name in names
    }
    assert (lineage["stage"], lineage["verb"], lineage["attempts"]) == ("second", "data decontaminate", 1)
    assert lineage["config"]["data"]["source"] == "@first/kept.jsonl"
    assert lineage["config"]["ngram"] == 10
    assert "output" not in lineage["config"]
    assert lineage["code"]["version"] == __version__
    assert lineage["started"] <= lineage["finished"]
    assert lineage["seconds"] > 0


def test_a_stage_can_be_run_by_hand(recipe: Recipe) -> None:
    """With the run file that the recipe gave it; the result is the same."""
    recipe.run()
    kept = recipe.output / "second/kept.jsonl"
    before = kept.read_bytes()
    kept.unlink()
    done = recipe.call("data", "decontaminate", "out/second/stage.toml")
    assert done.returncode == 0, done.stderr
    assert kept.read_bytes() == before
    assert recipe.call("data", "decontaminate", "out/second/config.toml", "--dry-run").stdout == (
        recipe.call("data", "decontaminate", "out/second/stage.toml", "--dry-run").stdout
    )


def test_files_from_outside_count_by_content(recipe: Recipe) -> None:
    recipe.run()
    exam = recipe.folder / EXAM
    os.utime(exam)
    assert set(recipe.ran().values()) == {"unchanged"}
    exam.write_text(exam.read_text().replace("exam", "test"))
    assert set(recipe.states().values()) == {"out of date", "waits"}
    assert recipe.ran() == {"first": "ran", "second": "ran", "third": "ran"}


def test_results_that_are_gone_or_altered_are_made_again(recipe: Recipe) -> None:
    recipe.run()
    (recipe.output / "second/kept.jsonl").write_text('{"text": "other"}\n')
    assert recipe.states()["second"] == "out of date"
    assert "its kept.jsonl is no longer what it wrote" in recipe.call("status", "out").stdout
    assert recipe.ran() == {"first": "unchanged", "second": "ran", "third": "unchanged"}
    (recipe.output / "third/dropped.jsonl").unlink()
    assert recipe.ran()["third"] == "ran"
    assert superseded(recipe) == ["second-1", "third-1"]


def test_from_and_only(recipe: Recipe) -> None:
    assert "stage first, which has not finished" in recipe.run("--only=second", code=2).stderr
    assert recipe.ran("--only=first") == {"first": "ran", "second": "not run", "third": "not run"}
    assert not (recipe.output / "summary.json").exists()
    assert recipe.states() == {"first": "done", "second": "not run", "third": "not run"}
    recipe.run()
    assert recipe.ran("--from=second") == {"first": "unchanged", "second": "ran", "third": "ran"}
    assert superseded(recipe) == ["second-1", "third-1"]
    recipe.ran("--from=second", "--only=second")
    assert superseded(recipe) == ["second-1", "second-2", "third-1"]
    assert "no stage 'sceond', did you mean 'second'" in recipe.run("--from=sceond", code=2).stderr
    assert "no stage 'x'" in recipe.run("--only=x", code=2).stderr


def test_what_only_leaves_out_is_not_called_done(recipe: Recipe) -> None:
    """The first stage is out of date, so the recipe as a whole is not done, whatever lies in its folders."""
    recipe.run()
    recipe.rows(["other words"])
    assert recipe.ran("--only=third") == {"first": "out of date", "second": "waits", "third": "unchanged"}
    assert not (recipe.output / "summary.json").exists()


def test_a_report_that_cannot_be_written_does_not_hide_why(recipe: Recipe) -> None:
    recipe.run()
    recipe.tree["stages"]["second"]["text"] = ["txet"]
    (recipe.output / "third/stage.json").write_text("{")
    failed = recipe.run(code=1).stderr
    assert "stage second (data decontaminate) ended with exit code 2" in failed
    assert "the state of the stages cannot be shown" in failed


def test_from_is_begun_once(recipe: Recipe) -> None:
    """Interrupted and repeated, it goes on with what it has made anew."""
    recipe.run()
    recipe.tree["stages"]["third"]["data"]["source"] = "@second/later.jsonl"
    recipe.run("--from=first", code=2)
    before = made(recipe)["first"]
    recipe.tree["stages"]["third"]["data"]["source"] = "@second/kept.jsonl"
    recipe.run("--only=second")  # does not end what was begun
    assert recipe.ran("--from=first") == {"first": "unchanged", "second": "unchanged", "third": "ran"}
    assert made(recipe)["first"] == before
    assert recipe.ran("--from=first") == {"first": "ran", "second": "ran", "third": "ran"}


def test_an_artefact_that_no_stage_wrote(recipe: Recipe) -> None:
    """Found as soon as the stage that should have written it has ended."""
    recipe.tree["stages"]["third"]["data"]["source"] = "@first/keptt.jsonl"
    failed = recipe.run(code=2).stderr
    assert "third: '@first/keptt.jsonl' is not there: the stage first has written dropped.jsonl, kept.jsonl" in failed
    assert recipe.states() == {"first": "done", "second": "not run", "third": "not run"}
    recipe.tree["stages"]["third"]["data"]["source"] = "@first/kept.jsonl"
    assert recipe.ran()["first"] == "unchanged"


def test_an_outside_file_that_is_not_there(recipe: Recipe) -> None:
    recipe.tree["stages"]["third"]["data"]["source"] = "none.jsonl"
    assert "note: stage third needs none.jsonl, which does not exist" in recipe.run("--dry-run").stdout
    failed = recipe.run(code=2).stderr
    assert f"stage third: none.jsonl does not exist ({recipe.folder / 'none.jsonl'})" in failed
    assert not (recipe.output / "first").exists()


def test_a_stage_that_fails(recipe: Recipe) -> None:
    """It says so itself; the recipe says which one, and keeps what was finished."""
    recipe.tree["stages"]["second"]["text"] = ["txet"]
    failed = recipe.run(code=1).stderr
    assert "megatron-r1 data decontaminate: " in failed
    assert "megatron-r1 run: stage second (data decontaminate) ended with exit code 2" in failed
    assert not (recipe.output / "summary.json").exists()
    assert recipe.states() == {"first": "done", "second": "failed", "third": "not run"}
    recipe.tree["stages"]["second"]["text"] = ["text"]
    assert recipe.ran() == {"first": "unchanged", "second": "ran", "third": "ran"}


def test_a_full_disk(recipe: Recipe) -> None:
    """Of the stage, then of the recipe itself: the device /dev/full takes the place of a file that they write."""
    recipe.run()
    for name, writer in (("config.toml", "stage second (data decontaminate):"), ("stage.toml", "megatron-r1 run:")):
        recipe.as_if_killed("second")
        file = recipe.output / "second" / name
        file.unlink()
        file.symlink_to("/dev/full")
        failed = recipe.run(code=1).stderr
        assert f"{writer} the disk is full" in failed
        assert "the same command goes on from there" in failed
        file.unlink()
        assert recipe.ran() == {"first": "unchanged", "second": "ran", "third": "unchanged"}
    assert superseded(recipe) == []


def test_dry_run(recipe: Recipe) -> None:
    """Nothing has to be there, nothing is written."""
    table = recipe.run("--dry-run").stdout
    assert [line.split()[:2] for line in table.splitlines()[2:5]] == [["1", "first"], ["2", "second"], ["3", "third"]]
    graph = json.loads(recipe.run("--dry-run", "--json").stdout)
    assert [(row["stage"], row["needs"], row["state"]) for row in graph["stages"]] == [
        ("first", [], "not run"),
        ("second", ["first"], "not run"),
        ("third", ["second"], "not run"),
    ]
    run_file = recipe.run("--stage=second").stdout
    assert f'source = "{recipe.output}/first/kept.jsonl"' in run_file
    assert f'output = "{recipe.output}/second"' in run_file
    assert not recipe.output.exists()


def test_a_dry_run_of_a_part(recipe: Recipe) -> None:
    """It says what the same command would do, and does nothing; a name that there is not is an error."""

    def states(*arguments: str) -> list[str]:
        graph = json.loads(recipe.run("--dry-run", "--json", *arguments).stdout)
        return [row["state"] for row in graph["stages"]]

    note = "note: --only second: it needs the stage first, which has not finished"
    assert note in recipe.run("--dry-run", "--only=second").stdout
    recipe.run()
    before = made(recipe)
    assert states() == ["done"] * 3
    assert states("--from=second") == ["done", "would run anew", "would run anew"]
    assert states("--only=second") == ["left out", "done", "left out"]
    assert states("--from=first", "--only=second") == ["left out", "would run anew", "left out"]
    assert "would run anew" in recipe.run("--dry-run", "--from=third").stdout
    assert (made(recipe), superseded(recipe)) == (before, [])
    for name in ("from", "only"):
        assert "no stage 'secnd', did you mean 'second'?" in recipe.run(f"--{name}=secnd", "--dry-run", code=2).stderr


def test_an_output_folder_can_be_moved(recipe: Recipe) -> None:
    recipe.run()
    recipe.output.rename(recipe.folder / "elsewhere")
    recipe.tree["output"] = "elsewhere"
    assert set(recipe.ran().values()) == {"unchanged"}


def test_status_of_no_recipe(recipe: Recipe) -> None:
    done = recipe.call("status", "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert "nowhere is not the output folder of a recipe that has been run" in done.stderr
    assert "status takes no '--x=1'" in recipe.call("status", "nowhere", "--x=1").stderr


def test_a_folder_of_someone_else_is_kept(recipe: Recipe) -> None:
    (recipe.output / "first").mkdir(parents=True)
    (recipe.output / "first/mine.txt").write_text("mine")
    assert "its folder was not made by this recipe" in recipe.run().stderr
    assert (recipe.output / "superseded/first-1/mine.txt").read_text() == "mine"


@pytest.mark.parametrize("arguments", [["--stages.first.ngram=0"], ["--stage=none", "--dry-run"], ["--sed=3"]])
def test_bad_arguments(recipe: Recipe, arguments: list[str]) -> None:
    assert recipe.run(*arguments, code=2).stderr.startswith("megatron-r1 run: ")
