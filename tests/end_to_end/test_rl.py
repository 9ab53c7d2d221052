"""Reinforcement learning, interrupted at every turn: no process stays, no checkpoint breaks, no bit is lost."""

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end import runs
from tests.end_to_end.runs import SAVED, Command, checkpoint, rows, weights
from tests.processes import command_line

HUNG = 69
"""Exit code of a run that a deadline has ended (EX_UNAVAILABLE of sysexits.h)."""

pytestmark = pytest.mark.timeout(900)  # several starts of vLLM in one test


@pytest.fixture(scope="module")
def undisturbed(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_file = runs.write(folder / "rl.toml", runs.rl(prepared, folder / "run", runs.free_port()))
    with Command("rl", run_file) as command:
        assert command.end(200) == 0, command.message()
    return folder / "run"


def test_the_undisturbed_run_learns_something(undisturbed: Path, prepared: Path) -> None:
    """Otherwise equal bits below would say little."""
    assert [row["step"] for row in rows(undisturbed)] == [0, 1, 2]
    assert all(row["grad_norm"] > 1e-3 for row in rows(undisturbed))
    assert rows(undisturbed)[-1]["kl"] > 0
    first, second, third = [row["response_length"] for row in rows(undisturbed)]
    assert max(first, second) <= 32 < third, "`max_tokens` changes after two steps"
    assert weights(undisturbed) != weights(prepared / "base")
    summary = runs.summary(undisturbed)
    assert summary["logprob_difference_mean"] < 1e-5
    for name in ("heldout_accuracy_base", "heldout_accuracy_final", "format_rate_base", "format_rate_final"):
        assert 0 <= summary[name] <= 1


class frozen:  # noqa: N801 (reads as a word in a with statement)
    """Holds vLLM's processes, so that the run certainly waits for an answer of theirs."""

    def __init__(self, command: Command) -> None:
        self.engine = command.engine()

    def __enter__(self) -> None:
        for process in self.engine:
            process.suspend()

    def __exit__(self, *_: object) -> None:
        for process in self.engine:
            if process.is_running():
                process.resume()


def engine_starting(command: Command) -> bool:
    """vLLM's server runs, and has started its engine core or is about to."""
    return any("EngineCore" in " ".join(command_line(process)) for process in command.engine())


def armed(output: Path) -> Path:
    """From here on the next update announces itself; returns what appears when it does."""
    marker = output.with_suffix(".armed")
    marker.touch()
    return marker.with_suffix(".seen")


def steps_done(output: Path, count: int) -> Callable[[], bool]:
    return lambda: (output / "metrics.jsonl").exists() and len(rows(output)) >= count


def at_start_of_the_engine(command: Command, output: Path) -> None:
    command.until(lambda: engine_starting(command)).send(signal.SIGINT)
    runs.interrupted_cleanly(command, 130)


def at_start_of_the_engine_by_sigusr1(command: Command, output: Path) -> None:
    command.until(lambda: engine_starting(command)).send(signal.SIGUSR1)
    runs.interrupted_cleanly(command, SAVED)


def in_a_rollout_by_sigterm(command: Command, output: Path) -> None:
    """The step before it is saved, though a checkpoint was not due; the rollout is not waited for."""
    command.until(steps_done(output, 1))
    with frozen(command):
        command.send(signal.SIGTERM)
        runs.interrupted_cleanly(command, SAVED)
    assert checkpoint(output, 1)()
    assert not checkpoint(output, 2)()


def in_an_update_by_ctrl_c(command: Command, output: Path) -> None:
    command.until(armed(output).exists).send(signal.SIGINT)
    runs.interrupted_cleanly(command, 130)
    assert not checkpoint(output, 2)()


def in_a_checkpoint_by_sigkill(command: Command, output: Path) -> None:
    partial = output / "checkpoints/step_00000002.partial"
    command.until(partial.exists, pause=0.001).send(signal.SIGKILL)
    assert command.end() == -signal.SIGKILL
    assert partial.exists()


def in_a_rollout_by_sigkill(command: Command, output: Path) -> None:
    """Of the run's own process alone, as the kernel does when memory runs out."""
    command.until(checkpoint(output, 2)).look()
    command.process.kill()
    assert command.end() == -signal.SIGKILL


def by_a_dead_engine(command: Command, output: Path) -> None:
    """One that may not be restarted; within half a minute, teardown included."""
    command.until(checkpoint(output, 2))
    core = next(process for process in command.engine() if "EngineCore" in " ".join(command_line(process)))
    core.kill()
    assert command.end(30) == 1
    said = command.message()
    assert "Traceback" not in said.split("megatron-r1 rl: ")[0]
    assert "megatron-r1 rl: vLLM at http://127.0.0.1" in said
    assert f"the end of its log {output}/logs/engine-0.log" in said
    assert "EngineCore" in said


def test_interrupted_at_every_turn_it_ends_with_the_same_bits(
    undisturbed: Path, prepared: Path, tmp_path: Path
) -> None:
    output, port = tmp_path / "run", runs.free_port()
    run_file = runs.write(tmp_path / "rl.toml", runs.rl(prepared, output, port))
    turns: list[tuple[Callable[[Command, Path], None], str]] = [
        (at_start_of_the_engine, ""),
        (at_start_of_the_engine_by_sigusr1, ""),
        (in_a_rollout_by_sigterm, "--checkpoint.every=100"),
        (in_an_update_by_ctrl_c, ""),
        (in_a_checkpoint_by_sigkill, ""),
        (in_a_rollout_by_sigkill, ""),
    ]
    for turn, override in turns:
        with Command("rl", run_file, *filter(None, [override])) as command:
            turn(command, output)
        assert runs.is_free(port), turn.__name__
    with Command("rl", run_file) as command:
        assert command.end(200) == 0, command.message()
    assert weights(output) == weights(undisturbed)
    for kind in ("step", "evaluation"):
        assert rows(output, kind) == rows(undisturbed, kind)
    assert runs.summary(output) == runs.summary(undisturbed)


def test_an_engine_that_hangs_is_named(prepared: Path, tmp_path: Path) -> None:
    output, port = tmp_path / "run", runs.free_port()
    deadlines = {"rollout": 40.0, "sync": 40.0}  # the first rollout warms the engine up
    run_file = runs.write(tmp_path / "rl.toml", runs.rl(prepared, output, port) | {"guard": {"deadlines": deadlines}})
    with Command("rl", run_file) as command:
        command.until(steps_done(output, 1))
        with frozen(command):
            assert command.end(120) == HUNG
        said = command.message()
    assert re.search("megatron-r1 rl: rank 0 has waited longer than the 40 s of phase (rollout|sync)", said)
    assert "fleet.py" in said  # the stack
    assert runs.is_free(port)


def test_two_processes_take_the_step_that_one_takes(undisturbed: Path, prepared: Path, tmp_path: Path) -> None:
    """Interrupted by SIGUSR1 in a rollout, resumed, and then ended by the death of the engine."""
    output, port = tmp_path / "run", runs.free_port()
    run_file = runs.write(tmp_path / "rl.toml", runs.rl(prepared, output, port))
    with Command("rl", run_file, "--parallel.processes=2") as command:
        command.until(checkpoint(output, 1))
        with frozen(command):
            command.process.send_signal(signal.SIGUSR1)
            runs.interrupted_cleanly(command, SAVED)
    [first], [expected] = rows(output), rows(undisturbed)[:1]
    assert first.keys() == expected.keys()
    for name, value in expected.items():
        if name == "kind":
            continue
        assert first[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
    with Command("rl", run_file, "--parallel.processes=2", "--rollout.max_restarts=0") as command:
        by_a_dead_engine(command, output)
        assert command.message().count("megatron-r1 rl") == 1
    assert runs.is_free(port)


@pytest.fixture
def closed_gate(prepared: Path, tmp_path: Path) -> Iterator[tuple[Command, Path]]:
    output = tmp_path / "run"
    run_file = runs.write(tmp_path / "rl.toml", runs.rl(prepared, output, runs.free_port()))
    with Command("rl", run_file, "--logprob_bound=1e-12") as command:
        yield command, output


def test_a_difference_above_the_bound_stops_the_run(closed_gate: tuple[Command, Path]) -> None:
    command, output = closed_gate
    assert command.end() == 1
    [said] = [line for line in command.message().splitlines() if line.startswith("megatron-r1 ")]
    assert "differ by " in said
    assert "e-0" in said
    assert "logprob_bound = 1e-12" in said
    assert not (output / "checkpoints").exists()
    assert not (output / "hf").exists()


def ppo(prepared: Path, output: Path, port: int) -> dict[str, Any]:
    """A critic that warms up for two steps, a KL penalty in the reward, and in the last step other prompts.

    Nobody answers these right, so their groups are uniform, and asked again in another round.
    """
    tree = runs.rl(prepared, output, port)
    options: dict[str, Any] = runs.SUM["options"]
    other = {**runs.SUM, "options": {**options, "max_terms": 3}}
    return tree | {
        "steps": 4,
        "advantage": {"type": "gae", "lam": 0.95, "kl_coef": 0.05},
        "loss": {"type": "ppo"},
        "critic": {"optim": {"lr": 5e-3}, "warmup": 2, "epochs": 2},
        "dynamic_sampling": {"max_rounds": 2},
        "general": {"task": other, "template": "r1_zero_short", "from_step": 3, "share": 0.5, "rewards": ["accuracy"]},
    }


def test_ppo_goes_on_bit_for_bit(prepared: Path, tmp_path: Path) -> None:
    """Killed in the warm-up, before the policy's optimizer has seen a gradient, and after it."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    port = runs.free_port()
    with Command("rl", runs.write(tmp_path / "whole.toml", ppo(prepared, whole, port))) as command:
        assert command.end(300) == 0, command.message()
    run_file = runs.write(tmp_path / "cut.toml", ppo(prepared, cut, port))
    for done in (1, 3):
        with Command("rl", run_file) as command:
            command.until(checkpoint(cut, done), seconds=300).send(signal.SIGKILL)
            assert command.end() == -signal.SIGKILL
    with Command("rl", run_file) as command:
        assert command.end(300) == 0, command.message()
    assert weights(cut) == weights(whole) != weights(prepared / "base")
    assert (cut / "critic/hf/model.safetensors").read_bytes() == (whole / "critic/hf/model.safetensors").read_bytes()
    assert rows(cut) == rows(whole)
    assert runs.summary(cut) == runs.summary(whole)
    assert runs.summary(whole)["general_questions_drawn"] == 4
    assert "reward 'accuracy' is 0 for all 16 samples of step 0" in (whole / "run.log").read_text()
    assert 0.5 < runs.summary(whole)["critic_bytes"] / runs.summary(whole)["policy_bytes"] < 1.1
    first, *_, last = rows(whole)
    assert last["dropped_groups"] == 4
    assert "ratio" not in first
    assert last["critic_grad_norm"] > 0
    assert last["ratio"] == pytest.approx(1, abs=0.2)
