"""A conversion that is killed, or whose disk fills, goes on by the same command."""

import errno
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_r1.config.convert import CastConfig, ImportConfig
from megatron_r1.convert.verbs import run_cast, run_import
from megatron_r1.convert.workspace import Workspace
from megatron_r1.errors import ConfigError
from tests.convert.invented import contents, same, tensors, write

SHARD = 40_000

HANGING = """
import sys, time, threading
from pathlib import Path
from megatron_r1.config.convert import CastConfig, ImportConfig
from megatron_r1.checkpoint import source
from megatron_r1.convert import target, verbs

verb, folder, output, rules = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
target.SMALL_PART_BYTES = 40_000
read, count = source.HuggingFaceSource.read, iter(range(10**9))

def hang(self, rule):
    if next(count) == rules:
        time.sleep(600)
    return read(self, rule)

source.HuggingFaceSource.read = hang
if verb == "cast":
    verbs.run_cast(CastConfig(source=folder, output=output, dtype="float32", max_shard_bytes=40_000, workers=1))
else:
    verbs.run_import(ImportConfig(source=folder, output=output, workers=1))
"""
"""A conversion in small parts that stands still at one of its rules."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("kill") / "hf")


def parts(partial: Path) -> dict[str, tuple[int, int]]:
    """The finished ones, with inode and time of change."""
    noted = [path.stem for path in partial.glob(".parts/*.json") if path.name != "identity.json"]
    files = {path.name: path.stat() for name in noted for path in partial.rglob(name)}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in files.items()}


def killed(verb: str, source: Path, output: Path, rules: int) -> dict[str, tuple[int, int]]:
    """Run until the process stands still, kill it, and return the parts that it has finished."""
    command = [sys.executable, "-c", HANGING, verb, source, output, str(rules)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    partial = output.with_name(f"{output.name}.partial")
    seen, since = -1, time.monotonic()
    try:
        while not seen or time.monotonic() - since < 2:
            assert process.poll() is None
            if (now := len(parts(partial))) != seen:
                seen, since = now, time.monotonic()
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not output.exists()
    return parts(partial)


@pytest.mark.parametrize("verb", ["cast", "import"])
def test_finished_parts_are_not_written_again(
    source: Path, tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megatron_r1.convert.target.SMALL_PART_BYTES", SHARD)
    before = contents(source)

    def convert(output: Path) -> dict[str, object]:
        if verb == "import":
            return run_import(ImportConfig(source=source, output=output))
        return run_cast(CastConfig(source=source, output=output, dtype="float32", max_shard_bytes=SHARD))

    finished = killed(verb, source, tmp_path / "out", rules=50)
    assert len(finished) > 2
    figures = convert(tmp_path / "out")
    assert figures["resumed_parts"] == len(finished) < figures["parts"]
    assert "going on at" in capsys.readouterr().err
    files = {path.name: path.stat() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {name: (files[name].st_ino, files[name].st_mtime_ns) for name in finished} == finished
    convert(tmp_path / "undisturbed")
    assert contents(tmp_path / "out", "summary.json") == contents(tmp_path / "undisturbed", "summary.json")
    assert contents(source) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "undisturbed"]


def test_other_options_begin_anew(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert killed("cast", source, tmp_path / "out", rules=50)
    figures = run_cast(CastConfig(source=source, output=tmp_path / "out", dtype="bfloat16", max_shard_bytes=SHARD))
    assert figures["resumed_parts"] == 0
    assert "was begun with another options: begins anew" in capsys.readouterr().err
    assert same(tensors(tmp_path / "out"), tensors(source))


def test_a_changed_source_begins_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "hf")
    assert killed("cast", source, tmp_path / "out", rules=50)
    (source / "model.safetensors").touch()
    figures = run_cast(CastConfig(source=source, output=tmp_path / "out", dtype="float32", max_shard_bytes=SHARD))
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
    code = HANGING.replace("== rules", "== -1")
    limit = (300_000, 300_000)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code.replace("40_000, workers", "10**9, workers"),
            "cast",
            source,
            tmp_path / "out",
            "0",
        ],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    assert "File too large" in done.stderr.splitlines()[-1]
    assert "DataError" in done.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert not list((tmp_path / "out.partial").glob("*.safetensors*"))
