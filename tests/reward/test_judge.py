import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megatron_r1.errors import ConfigError
from megatron_r1.reward.judge import Judge
from megatron_r1.types import Group, Question, Sample

HOSTILE = {"type": "tests.reward.hostile:Hostile"}
QUESTION = Question(
    "sum-1",
    "reasoning_gym",
    "2 + 3 =",
    "5",
    {
        "config": {"dataset": "chain_sum"},
        "entry": {"question": "2 + 3 =", "answer": "5", "metadata": {}},
    },
)


def group(*texts: str) -> Group:
    return Group(QUESTION, [1], [Sample([7], [-0.5], text, True, 3) for text in texts])


def parts(group: Group, name: str) -> list[float | None]:
    return [sample.rewards[name] for sample in group.samples]


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    with Judge({"hostile": HOSTILE}, workers=2, timeout=1.0) as judge:
        yield judge


@pytest.fixture(autouse=True)
def _fresh_counters(judge: Judge) -> None:
    for name in judge.counters:
        judge.counters[name] = 0


def test_weighted_sum_of_isolated_and_inline_rewards() -> None:
    rewards = {"accuracy": {"type": "task", "weight": 2}, "format": {"type": "format", "weight": 0.5}}
    asked = group("<think>a</think> <answer>5</answer>", "<think>a</think> <answer>4</answer>", "x")
    with Judge(rewards, tasks=[{"type": "reasoning_gym", "dataset": "chain_sum"}], workers=1, timeout=60.0) as judge:
        judge([asked])
    assert [sample.rewards for sample in asked.samples] == [
        {"accuracy": 1.0, "format": 1.0},
        {"accuracy": 0.0, "format": 1.0},
        {"accuracy": 0.0, "format": 0.0},
    ]
    assert [sample.reward for sample in asked.samples] == [2.5, 0.5, 0.0]
    assert asked.samples[0].tokens == [7]
    assert [sample.correct for sample in asked.samples] == [True, False, False]


def test_a_question_names_its_rewards() -> None:
    fixed = {"type": "tests.reward.hostile:Careless", "scores": ["1"]}
    judge, asked = Judge({"one": fixed, "two": fixed, "three": {**fixed, "weight": 5.0}}), group("a")
    asked.question = replace(QUESTION, rewards=("three", "one"))
    judge([asked])
    assert asked.samples[0].rewards == {"one": 1.0, "two": None, "three": 1.0}
    assert asked.samples[0].reward == 6.0
    asked.question = replace(QUESTION, rewards=("tree",))
    with pytest.raises(ConfigError, match=r"sum-1 is scored by 'tree', did you mean 'three'\?.*it has one, two, three"):
        judge([asked])


def test_what_a_reward_needs_is_missed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    section = {"type": "tests.reward.hostile:Unprepared"}
    with Judge({"it": section}, workers=1, timeout=60.0) as judge:
        judge.wait_until_ready()
        asked = group("1", "exit")
        judge([asked])
    assert parts(asked, "it") == [1.0, -1.0]
    monkeypatch.setenv("TEST_UNPREPARED", "1")
    with Judge({"it": section}, workers=1) as judge, pytest.raises(ConfigError, match="no abacus"):
        judge.wait_until_ready()


def test_correctness_comes_first() -> None:
    rewards = {"echo": {"type": "tests.reward.hostile:Echo"}, "right": {"type": "tests.reward.hostile:Patient"}}
    asked = group("1", "0.9", "none", "1.1")
    with Judge(rewards, workers=1, timeout=0.001) as judge:
        judge([asked])
    assert [sample.correct for sample in asked.samples] == [True, False, None, True]
    assert parts(asked, "echo") == [1.0, 0.0, None, 1.0]


def test_groups_are_scored_while_others_are_awaited(judge: Judge) -> None:
    """The second group is handed in when the first has been verified, and `finish` has both."""
    first, second = group("1"), group("2", "3")
    sitting = judge.sitting()
    sitting.submit(first)
    sitting._submitted[0].pending[0][1].result(timeout=60)
    sitting.submit(second)
    sitting.finish()
    assert [first.samples[0].reward, *(sample.reward for sample in second.samples)] == [1.0, 2.0, 3.0]


def test_an_open_sitting_keeps_nobody_else_waiting(judge: Judge) -> None:
    """An evaluation hands its groups in as they are sampled; groups to train on are scored meanwhile."""
    evaluated, trained, last = group("1"), group("2"), group("3")
    evaluation = judge.sitting()
    evaluation.submit(evaluated)
    other = threading.Thread(target=judge, args=([trained],), daemon=True)
    other.start()
    other.join(60)
    assert not other.is_alive()
    assert (trained.samples[0].reward, evaluated.samples[0].rewards) == (2.0, {"hostile": None}), "not each other's"
    evaluation.submit(last)
    evaluation.finish()
    assert [evaluated.samples[0].reward, last.samples[0].reward] == [1.0, 3.0]


def test_none_is_left_out_of_the_sum(judge: Judge) -> None:
    asked = group("none", "3.5")
    judge([asked])
    assert parts(asked, "hostile") == [None, 3.5]
    assert [sample.reward for sample in asked.samples] == [0.0, 3.5]


@pytest.mark.parametrize(
    ("text", "counter"),
    [
        ("hang", "verifier_timeouts"),
        ("exit", "verifier_crashes"),
        ("segfault", "verifier_crashes"),
        ("sys.exit", "verifier_crashes"),
        ("not a number", "verifier_crashes"),
    ],
)
def test_only_the_culprit_scores_zero(judge: Judge, text: str, counter: str) -> None:
    groups = [group("1", "2"), group("3", text, "4")]
    judge(groups)
    assert [parts(asked, "hostile") for asked in groups] == [[1.0, 2.0], [3.0, 0.0, 4.0]]
    assert dict(judge.counters) == {"verifier_timeouts": 0, "verifier_crashes": 0} | {counter: 1}
    judge(groups[:1])
    assert parts(groups[0], "hostile") == [1.0, 2.0]


def test_workers_that_die_between_steps_are_replaced(judge: Judge) -> None:
    judge([group("1")])
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
    asked = group("1", "2")
    judge([asked])
    assert parts(asked, "hostile") == [1.0, 2.0]
    assert judge.counters["verifier_crashes"] == 0


def test_a_worker_that_is_killed_while_it_verifies_costs_no_sample_its_score(judge: Judge, tmp_path: Path) -> None:
    asked = group("1", f"killed {tmp_path}/once", "2")
    judge([asked])
    assert parts(asked, "hostile") == [1.0, 5.0, 2.0]
    assert judge.counters["verifier_crashes"] == 0


def test_a_sample_that_has_its_worker_killed_twice_scores_zero(judge: Judge, tmp_path: Path) -> None:
    """As one does that takes all memory."""
    asked = group("1", f"killed again {tmp_path}/always", "2")
    judge([asked])
    assert parts(asked, "hostile") == [1.0, 0.0, 2.0]
    assert judge.counters["verifier_crashes"] == 1


def test_several_culprits_in_one_chunk(judge: Judge) -> None:
    asked = group("exit", "1", "segfault", "exit", "2")
    judge([asked])
    assert parts(asked, "hostile") == [0.0, 1.0, 0.0, 0.0, 2.0]
    assert judge.counters["verifier_crashes"] == 3


def test_an_interrupt_kills_a_hanging_worker() -> None:
    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    def hang() -> None:
        with Judge({"hostile": HOSTILE}, workers=1, timeout=600.0) as judge:
            judge([group("1")])
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            judge([group("hang")])

    before = set(multiprocessing.active_children())
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            hang()
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert not set(multiprocessing.active_children()) - before


def test_more_samples_than_a_chunk(judge: Judge) -> None:
    groups = [group(*(str(100 * number + i) for i in range(150))) for number in range(3)]
    judge(groups)
    assert [parts(asked, "hostile") for asked in groups] == [
        [float(100 * number + i) for i in range(150)] for number in range(3)
    ]


def test_a_users_mistake_is_not_a_score(judge: Judge) -> None:
    with pytest.raises(ConfigError, match="this run file is wrong"):
        judge([group("config")])


def test_workers_without_torch_and_gone_at_the_end() -> None:
    with Judge({"hostile": HOSTILE, "accuracy": {"type": "accuracy"}}, workers=1, timeout=60.0) as judge:
        asked = group("torch", "pid")
        judge([asked])
    torch, pid = parts(asked, "hostile")
    assert torch == 0.0
    assert pid is not None
    assert not psutil.pid_exists(int(pid))


ORPHANS = """
import os, time
from megatron_r1.reward.judge import Judge
from megatron_r1.types import Group, Question, Sample
if __name__ == "__main__":
    with Judge({"hostile": {"type": "tests.reward.hostile:Hostile"}}, workers=1, timeout=600.0) as judge:
        group = Group(Question("0", "none", "q", "5"), [], [Sample([], [], "pid", True, 0)])
        judge([group])
        print(int(group.samples[0].reward), flush=True)
        group.samples[0].text = "hang"
        judge([group])
"""


def test_a_killed_run_leaves_no_worker() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
    run = subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True, env=environment)
    assert run.stdout is not None
    worker = int(run.stdout.readline())
    assert psutil.pid_exists(worker)
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    for _ in range(200):
        if not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    pytest.fail(f"worker {worker} outlived its run")


def test_rewards_without_isolation_need_no_worker() -> None:
    careless = {"type": "tests.reward.hostile:Careless", "scores": ["1", "2"]}
    judge, asked = Judge({"fixed": careless}), group("a", "b")
    judge([asked])
    assert [sample.reward for sample in asked.samples] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ({"a": {"type": "acuracy"}}, "no reward is called 'acuracy', did you mean 'accuracy'"),
        ({"a": {"type": "format", "weigth": 1.0}}, "unknown key 'weigth'"),
        ({"a": {"type": "format", "weight": "big"}}, r"rewards.a.weight is 'big'"),
        ({"a": {"type": "format", "weight": float("nan")}}, r"rewards.a.weight is nan"),
        ({"a": {"type": "tests.reward.hostile:Stranger"}}, "is not a subclass of megatron_r1.reward.base.Reward"),
        ({"a": {"type": "tests.reward.hostile:Undecided"}}, "cannot both be `isolated` and need"),
    ],
)
def test_bad_sections(rewards: dict[str, dict[str, object]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Judge(rewards)


@pytest.mark.parametrize(
    ("scores", "message"),
    [(["1"], "'fixed' returned 1 scores for 2 samples"), (["1", "inf"], "'fixed' returned inf")],
)
def test_scores_that_are_none(scores: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Judge({"fixed": {"type": "tests.reward.hostile:Careless", "scores": scores}})([group("a", "b")])


def test_the_package_imports_no_torch() -> None:
    code = (
        "import sys, megatron_r1.reward.judge, megatron_r1.reward.accuracy, megatron_r1.reward.format;"
        "print('torch' in sys.modules)"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "False"
