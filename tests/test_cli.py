"""The command line as a user meets it: a process, its output, its exit code."""

import errno
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from megatron_r1 import __version__
from megatron_r1.cli import CHECKPOINT_VERBS, VERBS, _disk_full, _import, _parser
from megatron_r1.options import read

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}


def megatron_r1(*arguments: str | Path, where: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_r1.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=where, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def assert_refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert [part for part in parts if part not in done.stderr] == []


def test_help_lists_the_verbs() -> None:
    done = megatron_r1("--help")
    assert done.returncode == 0
    assert [name for name in VERBS if name.split()[0] not in done.stdout] == []
    assert "--optim.lr=1e-4" in done.stdout


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_help(name: str) -> None:
    done = megatron_r1(*name.split(), "--help")
    assert done.returncode == 0
    assert VERBS[name].help in " ".join(done.stdout.split())
    assert "--dry-run" in done.stdout


@pytest.mark.parametrize(("name", "option"), [("run", "--from STAGE"), ("status", "--json")])
def test_commands_over_recipes_have_help(name: str, option: str) -> None:
    done = megatron_r1(name, "--help")
    assert done.returncode == 0
    assert option in done.stdout
    assert f"    {name} " in megatron_r1("--help").stdout


def test_version() -> None:
    assert megatron_r1("--version").stdout == f"megatron-r1 {__version__}\n"


def test_no_verb() -> None:
    assert_refused(megatron_r1(), "VERB")


def test_unknown_verb() -> None:
    assert_refused(megatron_r1("pretrian", "run.toml"), "pretrian", "pretrain")


def test_no_run_file() -> None:
    assert_refused(megatron_r1("rl"), "run.toml")


def test_dry_run_prints_the_resolved_config(rl_file: Path, tmp_path: Path) -> None:
    done = megatron_r1("rl", rl_file, "--dry-run", "--optim.lr=5e-5", "--seed=3", where=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    tree = tomllib.loads(done.stdout)
    assert (tree["optim"]["lr"], tree["seed"], tree["reference"]["refresh_every"]) == (5e-5, 3, 25)
    assert [path.name for path in tmp_path.iterdir()] == [rl_file.name]
    rl_file.write_text(done.stdout)
    assert megatron_r1("rl", rl_file, "--dry-run").stdout == done.stdout


def test_overrides_may_stand_before_the_file(rl_file: Path) -> None:
    done = megatron_r1("rl", "--seed=3", rl_file, "--dry-run")
    assert tomllib.loads(done.stdout)["seed"] == 3


@pytest.mark.parametrize("arguments", [["--sed=3"], ["--steps=x"], ["--steps", "5"], ["extra"], ["--group_size=1"]])
def test_bad_override(rl_file: Path, arguments: list[str]) -> None:
    assert_refused(megatron_r1("rl", rl_file, *arguments), "megatron-r1 rl: ", arguments[0].lstrip("-").split("=")[0])


def test_unknown_key_names_the_nearest(rl_file: Path) -> None:
    assert_refused(megatron_r1("rl", rl_file, "--optim.warmup=3"), "unknown key 'optim.warmup'", "'warmup_steps'")


def test_missing_file(tmp_path: Path) -> None:
    assert_refused(megatron_r1("pretrain", tmp_path / "none.toml"), "none.toml", "No such file")


@pytest.mark.parametrize(("text", "part"), [("", "is empty"), ("steps = ", "not valid TOML")])
def test_unreadable_file(rl_file: Path, text: str, part: str) -> None:
    rl_file.write_text(text)
    assert_refused(megatron_r1("rl", rl_file), str(rl_file), part)


def test_the_console_script_hands_on_the_exit_code(rl_file: Path) -> None:
    script = Path(sys.executable).with_name("megatron-r1")
    done = subprocess.run([script, "rl", rl_file, "--sed=3"], capture_output=True, text=True, check=False)
    assert_refused(done, "did you mean 'seed'")


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_unwinds_the_run(rl_file: Path, tmp_path: Path, sent: signal.Signals, code: int) -> None:
    """The verb's own function is exchanged for one that waits inside a `with`; everything around it is real."""
    (tmp_path / "waiting.py").write_text(
        "import contextlib, sys, time\n"
        "from megatron_r1 import cli\n"
        "@contextlib.contextmanager\n"
        "def opened():\n"
        "    try:\n"
        "        yield\n"
        "    finally:\n"
        "        print('closed', flush=True)\n"
        "def run(config):\n"
        "    with opened():\n"
        "        print('running', flush=True)\n"
        "        time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    cli.VERBS['rl'] = cli.Verb('', cli.VERBS['rl'].config, 'waiting:run')\n"
        "    sys.exit(cli.main(['rl', sys.argv[1]]))\n"
    )
    command = [sys.executable, str(tmp_path / "waiting.py"), str(rl_file)]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "running\n"
        process.send_signal(sent)
        output, errors = process.communicate(timeout=20)
    assert (process.returncode, output) == (code, "closed\n")
    assert "Traceback" not in errors


def test_a_dry_run_shows_and_checks_components(rl_file: Path) -> None:
    resolved = tomllib.loads(megatron_r1("rl", rl_file, "--dry-run").stdout)
    assert resolved["advantage"] == {"type": "group_relative", "std": "population", "eps": 0.0}
    assert resolved["loss"]["kl_coef"] == 0.001
    assert resolved["rewards"]["accuracy"]["partial_credit"] is False
    wrong = megatron_r1("rl", rl_file, "--dry-run", "--loss.type=grpo", "--loss.kl_coeff=0.1")
    assert_refused(wrong, "unknown key 'kl_coeff', did you mean 'kl_coef'")


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "x"), True),
        (OSError(errno.EDQUOT, "x"), True),
        (RuntimeError("I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EACCES, "x"), False),
        (RuntimeError("x"), False),
    ],
)
def test_a_full_disk_is_known_by_its_error(error: Exception, full: bool) -> None:
    assert _disk_full(error) is full
    wrapped = RuntimeError("could not save")
    wrapped.__cause__ = error
    assert _disk_full(wrapped) is full


@pytest.mark.parametrize("name", CHECKPOINT_VERBS)
def test_commands_on_checkpoints_describe_every_option(name: str) -> None:
    done = megatron_r1(name, "--help")
    assert done.returncode == 0
    assert CHECKPOINT_VERBS[name].help in " ".join(done.stdout.split())
    options = done.stdout.partition("options:")[2]
    bare = [line for line in options.splitlines() if line.startswith("  --") and len(line.split()) < 3]
    following = [options.split(line, 1)[1].lstrip("\n").split("\n")[0] for line in bare]
    assert [line for line in following if not line.startswith(" " * 10)] == []


def test_options_become_the_config() -> None:
    schema = _import(CHECKPOINT_VERBS["export"].config)
    arguments = ["export", "a", "b", "--dtype", "fp8", "--no-mtp", "--workers=3"]
    options = _parser(arguments).parse_args(arguments)
    config = read(options, schema)
    assert (config.source, config.output, config.dtype) == (Path("a"), Path("b"), "fp8")
    assert (config.mtp, config.workers, config.dry_run) == (False, 3, False)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--dtype=int4"], "dtype"),
        (["--workers=many"], "workers"),
        (["--wrokers=1"], "takes no '--wrokers=1'"),
    ],
    ids=str,
)
def test_bad_options_of_checkpoint_verbs(tmp_path: Path, arguments: list[str], part: str) -> None:
    assert_refused(megatron_r1("export", tmp_path, tmp_path / "out", *arguments), "megatron-r1 export", part)


def test_lists_numbers_and_required_options() -> None:
    arguments = ["quantize", "a", "b", "--format=fp8", "--samples=7", "--language=en", "--language", "de"]
    config = read(_parser(arguments).parse_args(arguments), _import(CHECKPOINT_VERBS["quantize"].config))
    assert (config.format, config.samples, config.language, config.folder) == ("fp8", 7, ["en", "de"], "")


def test_a_number_that_may_be_left_out() -> None:
    arguments = ["plan", "run.toml", "--gpus=16", "--spread=0.5"]
    config = read(_parser(arguments).parse_args(arguments), _import("megatron_r1.config.plan:PlanConfig"))
    assert (config.gpus, config.spread, config.price) == (16, 0.5, None)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["quantize", "a", "b"], "arguments are required: --format"),
        (["import", "a", "b", "--workers=0"], "megatron-r1 import: options: workers: Input should be greater than 0"),
        (["cast", "a", "b", "--dtype=int8"], "invalid choice: 'int8' (choose from 'bfloat16'"),
        (["cast", "a", "b", "--folder=hf"], "takes no '--folder=hf'"),
    ],
    ids=str,
)
def test_what_an_option_may_be_is_said(arguments: list[str], part: str) -> None:
    assert_refused(megatron_r1(*arguments), part)


def test_a_run_file_stands_for_the_options(tmp_path: Path) -> None:
    (tmp_path / "export.toml").write_text('source = "a"\noutput = "b"\ndtype = "fp8"\n')
    done = megatron_r1("export", tmp_path / "export.toml", "--workers=3", "--dry-run")
    assert done.returncode == 0
    assert tomllib.loads(done.stdout) | {"dtype": "fp8", "workers": 3} == tomllib.loads(done.stdout)
