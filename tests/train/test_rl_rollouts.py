"""What is asked at each step: positions, general prompts from their step on, and what dynamic sampling replaces."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from megatron_r1.config.load import validate
from megatron_r1.config.runs import RLConfig
from megatron_r1.report.samples import shown
from megatron_r1.train.collector import Collector
from megatron_r1.train.rollouts import Rollout, Rollouts
from megatron_r1.types import Group, Question, Sample

SUM = {"type": "reasoning_gym", "dataset": "chain_sum"}
OTHER = {"type": "reasoning_gym", "dataset": "basic_arithmetic"}


def config(**changes: Any) -> RLConfig:
    tree: dict[str, Any] = {
        "output": "x",
        "steps": 10,
        "questions": 8,
        "group_size": 2,
        "minibatches": 1,
        "model": {"path": "model"},
        "data": {"task": SUM},
        "heldout": {"task": SUM},
        "rewards": {"accuracy": {"type": "task"}},
        "rollout": {"max_model_len": 64, "max_tokens": 32},
        "optim": {"lr": 1e-4},
    }
    return validate(RLConfig, tree | changes, where="test")


class Answering:
    """Stands where a collector does: questions with a number in `uniform` get equal rewards, others unequal ones."""

    def __init__(self, uniform: Sequence[int] = ()) -> None:
        self.uniform = frozenset(uniform)
        self.rounds: list[tuple[list[str], int]] = []

    def collect(self, questions: Sequence[Question], n: int, seed: int) -> list[Group]:
        self.rounds.append(([question.id for question in questions], seed))
        return [Group(question, [1], self.answers(question, n)) for question in questions]

    def answers(self, question: Question, n: int) -> list[Sample]:
        same = int(question.id.rpartition("-")[2]) in self.uniform
        return [Sample([1], [0.0], "", True, 0, reward=0.0 if same else float(i)) for i in range(n)]


def sample(rollouts: Rollouts, answering: Answering, step: int) -> Rollout:
    return rollouts.sample(cast(Collector, answering), step)


def numbers(groups: Sequence[Group]) -> list[int]:
    return [int(group.question.id.rpartition("-")[2]) for group in groups]


def test_every_step_takes_the_next_questions_and_a_seed_of_its_own() -> None:
    rollouts, answering = Rollouts(config(), frozenset()), Answering(uniform=[0])
    taken = [numbers(sample(rollouts, answering, step).groups) for step in range(3)]
    assert taken == [list(range(8)), list(range(8, 16)), list(range(16, 24))]
    assert len({seed for _, seed in answering.rounds}) == 3
    assert rollouts.state() == {"questions_drawn": 24.0}


def test_uniform_groups_are_replaced_by_other_questions() -> None:
    """Of 0-7 two are uniform; of 8, 9 one; 10 is not."""
    answering = Answering(uniform=[1, 6, 9])
    rollout = sample(Rollouts(config(dynamic_sampling={}), frozenset()), answering, 0)
    assert numbers(rollout.groups) == [0, 2, 3, 4, 5, 7, 8, 10]
    assert numbers(rollout.sampled) == list(range(11))
    assert rollout.figures == {"dropped_groups": 3.0, "sampled_per_kept": 11 / 8}
    assert [len(asked) for asked, _ in answering.rounds] == [8, 2, 1]
    assert len({seed for _, seed in answering.rounds}) == 3


def test_after_the_last_round_the_rollout_is_filled_up() -> None:
    answering = Answering(uniform=range(1, 100))
    rollout = sample(Rollouts(config(dynamic_sampling={"max_rounds": 3}), frozenset()), answering, 0)
    assert len(answering.rounds) == 3
    assert numbers(rollout.groups) == list(range(8))
    assert rollout.figures["dropped_groups"] == 7 + 7 + 7


def test_a_resumed_run_asks_what_an_undisturbed_one_does() -> None:
    section = config(dynamic_sampling={}, general={"task": OTHER, "share": 0.5, "from_step": 1})
    undisturbed, first = Rollouts(section, frozenset()), Answering(uniform=range(0, 60, 3))
    for step in range(4):
        sample(undisturbed, first, step)
    state = Rollouts(section, frozenset())
    answering = Answering(uniform=range(0, 60, 3))
    for step in range(4):
        resumed = Rollouts(section, frozenset())
        resumed.restore(state.state())
        sample(resumed, answering, step)
        state = resumed
    assert answering.rounds == first.rounds
    assert state.state() == undisturbed.state()


class Learning(Answering):
    """Of ten problems numbers 0 to 3 are always answered right, 4 and 5 sometimes, the others never."""

    def answers(self, question: Question, n: int) -> list[Sample]:
        number = int(question.answer)
        verdicts = [number < 4 or (number < 6 and sample == 0) for sample in range(n)]
        return [Sample([1], [0.0], "", True, 0, reward=float(right), correct=right) for right in verdicts]

    @property
    def asked(self) -> list[list[str]]:
        return [names for names, _ in self.rounds]


@pytest.fixture
def problems(tmp_path: Path) -> dict[str, Any]:
    rows = [json.dumps({"problem": f"Say {number}.", "answer": str(number)}) for number in range(10)]
    (tmp_path / "problems.jsonl").write_text("\n".join(rows))
    return {"task": {"type": "math", "source": str(tmp_path / "problems.jsonl")}}


def test_in_later_epochs_questions_are_asked_by_their_pass_rates(problems: dict[str, Any]) -> None:
    """The first epoch asks all ten; then 4 and 5 have all their turns, and the others some."""
    section = config(data=problems, questions=5, curriculum={"floor": 0.2}, rewards={"accuracy": {"type": "accuracy"}})
    rollouts, answering = Rollouts(section, frozenset()), Learning()
    groups = [sample(rollouts, answering, step).groups for step in range(40)]
    asked = Counter(int(group.question.answer) for part in groups[2:] for group in part)
    assert sorted(int(group.question.answer) for part in groups[:2] for group in part) == list(range(10))
    epochs = rollouts.state()["questions_drawn"] / 10 - 1
    assert all(asked[number] == pytest.approx(epochs, abs=1) for number in (4, 5))
    rest = sum(asked[number] for number in (0, 1, 2, 3, 6, 7, 8, 9)) / 8
    assert 0.1 < rest / epochs < 0.3
    assert rollouts.state()["questions_drawn"] > 40 * 5


def test_a_resumed_run_draws_by_the_same_pass_rates(problems: dict[str, Any]) -> None:
    section = config(data=problems, questions=5, curriculum={"floor": 0.2}, rewards={"accuracy": {"type": "accuracy"}})
    undisturbed, first = Rollouts(section, frozenset()), Learning()
    for step in range(12):
        sample(undisturbed, first, step)
    state, answering = Rollouts(section, frozenset()), Learning()
    for step in range(12):
        resumed = Rollouts(section, frozenset())
        resumed.restore(json.loads(json.dumps(state.state() | state.kept())))
        sample(resumed, answering, step)
        state = resumed
    assert answering.asked == first.asked
    without = Rollouts(config(data=problems, questions=5), frozenset())
    assert without.kept() == {}


def test_general_prompts_come_from_their_step_on_in_their_share() -> None:
    section = config(general={"task": OTHER, "share": 0.25, "from_step": 2, "rewards": ["accuracy"]})
    rollouts, answering = Rollouts(section, frozenset()), Answering()
    for step in range(4):
        sample(rollouts, answering, step)
    names = [[one.partition("-")[0] for one in asked] for asked, _ in answering.rounds]
    assert [asked.count("basic_arithmetic") for asked in names] == [0, 0, 2, 2]
    assert [len(asked) for asked in names] == [8] * 4
    asked = [one for round_, _ in answering.rounds for one in round_]
    assert len(set(asked)) == 32, "a question was asked twice"
    assert rollouts.state() == {"questions_drawn": 28.0, "general_questions_drawn": 4.0}
    groups = sample(rollouts, answering, 4).groups, sample(rollouts, answering, 5).groups
    kept = {groups[step % 2][shown(groups[step % 2], step)].question.id.partition("-")[0] for step in (4, 5)}
    assert kept == {"chain_sum", "basic_arithmetic"}, "samples.jsonl has one of each"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantage": {"type": "gae"}}, r"'gae' needs the values of a critic: write \[critic.optim\]"),
        ({"critic": {"optim": {"lr": 1e-3}}}, "trained for nothing: advantage 'group_relative'"),
        ({"group_size": 1}, "advantage 'group_relative' compares"),
        (
            {"advantage": {"type": "gae"}, "critic": {"optim": {"lr": 1.0}}, "group_size": 1, "dynamic_sampling": {}},
            "dynamic_sampling compares",
        ),
        ({"advantage": {"type": "gae"}, "critic": {"optim": {"lr": 1.0}, "warmup": 10}}, "leaves none of 10 steps"),
        ({"general": {"task": OTHER, "share": 0.5, "from_step": 10}}, "ends after 10 steps"),
        ({"general": {"task": OTHER, "share": 0.01}}, "of 8 questions is none"),
        ({"general": {"task": OTHER, "share": 0.5, "rewards": ["acuracy"]}}, r"\[general\].*did you mean 'accuracy'"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_ppo_may_have_groups_of_one() -> None:
    critic = {"optim": {"lr": 1e-3}, "path": "elsewhere"}
    made = config(advantage={"type": "gae"}, loss={"type": "ppo"}, critic=critic, group_size=1)
    assert made.critic is not None
    assert made.critic.path == Path("elsewhere")
    assert made.loss["clip_eps"] == 0.2
