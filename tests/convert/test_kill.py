"""A conversion that is killed, or whose disk fills, goes on by the same command."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_r1.config.convert import CastConfig, ImportConfig
from megatron_r1.convert.verbs import run_cast, run_import
from megatron_r1.convert.workspace import Workspace
from megatron_r1.errors import ConfigError, DataError
from tests.convert.invented import contents, same, tensors, write

SHARD = 40_000
NAMED = ("summary.json", "README.md")
"""Files that name the output folder."""

HANGING = """
import sys, time
from pathlib import Path
from megatron_r1.config.convert import CastConfig, ImportConfig
from megatron_r1.checkpoint import source
from megatron_r1.convert import target, verbs

verb, folder, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
target.SMALL_PART_BYTES = 40_000
stripes, count = source.HuggingFaceSource.stripes, iter(range(10**9))

def hang(self, rule):
    if next(count) == 50:
        print("stands still", flush=True)
        time.sleep(600)
    return stripes(self, rule)

source.HuggingFaceSource.stripes = hang
if verb == "cast":
    verbs.run_cast(CastConfig(source=folder, output=output, dtype="float32", max_shard_bytes=40_000, workers=1))
else:
    verbs.run_import(ImportConfig(source=folder, output=output, workers=1))
"""
"""A conversion in small parts, one worker, that stands still at one of its rules and says so."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("kill") / "hf")


def parts(partial: Path) -> dict[str, tuple[int, int]]:
    """The finished ones, with inode and time of change."""
    noted = [path.stem for path in partial.glob(".parts/*.json") if path.name != "identity.json"]
    files = {path.name: path.stat() for name in noted for path in partial.rglob(name)}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in files.items()}


@pytest.fixture(scope="module")
def remains(source: Path) -> dict[str, Path]:
    """By verb, what stands in the place of the output's parts after a kill in the middle of one."""
    found = {}
    for verb in ("cast", "import"):
        output = source.with_name(verb)
        command = [sys.executable, "-c", HANGING, verb, source, output]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout
            assert process.stdout.readline() == "stands still\n"
            process.kill()
        assert not output.exists()
        found[verb] = output.with_name(f"{verb}.partial")
        assert len(parts(found[verb])) > 2
        assert list(found[verb].rglob("*.partial")) != []
    return found


def interrupted(remains: dict[str, Path], verb: str, output: Path) -> dict[str, tuple[int, int]]:
    """As if the kill had been of the conversion to `output`; its finished parts."""
    partial = output.with_name(f"{output.name}.partial")
    shutil.copytree(remains[verb], partial)
    return parts(partial)


def convert(verb: str, source: Path, output: Path) -> dict[str, object]:
    """What the killed process was at."""
    if verb == "import":
        return run_import(ImportConfig(source=source, output=output))
    return run_cast(CastConfig(source=source, output=output, dtype="float32", max_shard_bytes=SHARD))


@pytest.mark.parametrize("verb", ["cast", "import"])
def test_finished_parts_are_not_written_again(
    source: Path,
    remains: dict[str, Path],
    tmp_path: Path,
    verb: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("megatron_r1.convert.target.SMALL_PART_BYTES", SHARD)
    before = contents(source)
    finished = interrupted(remains, verb, tmp_path / "out")
    figures = convert(verb, source, tmp_path / "out")
    assert figures["resumed_parts"] == len(finished) < figures["parts"]
    assert "going on at" in capsys.readouterr().err
    files = {path.name: path.stat() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {name: (files[name].st_ino, files[name].st_mtime_ns) for name in finished} == finished
    convert(verb, source, tmp_path / "undisturbed")
    assert contents(tmp_path / "out", *NAMED) == contents(tmp_path / "undisturbed", *NAMED)
    assert contents(source) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "undisturbed"]


@pytest.mark.parametrize("verb", ["cast", "import"])
@pytest.mark.parametrize("lost", ["half of it", "all of it"])
def test_a_part_that_was_damaged_in_between_is_written_again(
    source: Path, remains: dict[str, Path], tmp_path: Path, verb: str, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_r1.convert.target.SMALL_PART_BYTES", SHARD)
    finished = interrupted(remains, verb, tmp_path / "out")
    [part] = (tmp_path / "out.partial").rglob(min(finished))
    if lost == "all of it":
        part.unlink()
    else:
        os.truncate(part, part.stat().st_size // 2)
    assert convert(verb, source, tmp_path / "out")["resumed_parts"] == len(finished) - 1
    convert(verb, source, tmp_path / "undisturbed")
    assert contents(tmp_path / "out", *NAMED) == contents(tmp_path / "undisturbed", *NAMED)


def test_other_options_begin_anew(
    source: Path, remains: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(remains, "cast", tmp_path / "out")
    figures = run_cast(CastConfig(source=source, output=tmp_path / "out", dtype="bfloat16", max_shard_bytes=SHARD))
    assert figures["resumed_parts"] == 0
    assert "was begun with another options: begins anew" in capsys.readouterr().err
    assert same(tensors(tmp_path / "out"), tensors(source))


def test_a_changed_source_begins_anew(
    source: Path, remains: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(remains, "cast", tmp_path / "out")
    file = source / "model.safetensors"
    before = file.stat()
    file.touch()
    try:
        figures = convert("cast", source, tmp_path / "out")
    finally:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert figures["resumed_parts"] == 0
    assert "another source_digest: begins anew" in capsys.readouterr().err


def test_two_at_once_are_refused(source: Path, tmp_path: Path) -> None:
    with Workspace(tmp_path / "out", {}).held(), pytest.raises(ConfigError, match="another process is converting"):
        run_cast(CastConfig(source=source, output=tmp_path / "out", dtype="float32"))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("verb", ["cast", "import"])
def test_a_full_disk_leaves_nothing_half_done(
    source: Path, small_disk: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_r1.convert.target.SMALL_PART_BYTES", SHARD)
    monkeypatch.setattr("megatron_r1.convert.verbs.check_room", lambda *_, **__: None)  # someone else fills it
    before, output = contents(source), small_disk / "out"

    def convert() -> dict[str, object]:
        if verb == "import":
            return run_import(ImportConfig(source=source, output=output))
        return run_cast(CastConfig(source=source, output=output, dtype="bfloat16", max_shard_bytes=SHARD))

    filler = small_disk / "filler"
    filler.write_bytes(bytes(500_000))
    with pytest.raises(OSError, match="No space left on device") as error:
        convert()
    assert error.value.errno == errno.ENOSPC
    assert not output.exists()
    assert [path.name for path in (small_disk / "out.partial").rglob("*.partial")] == []
    assert contents(source) == before
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=9m", small_disk], check=True)
    figures = convert()
    assert 0 < figures["resumed_parts"] < figures["parts"]


def test_a_file_that_may_not_grow_is_an_error_without_an_output(source: Path, tmp_path: Path) -> None:
    """A true refusal of the system, in one of the writes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(DataError, match="File too large"):
            run_cast(CastConfig(source=source, output=tmp_path / "out", dtype="float32"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert not list((tmp_path / "out.partial").glob("*.safetensors*"))
