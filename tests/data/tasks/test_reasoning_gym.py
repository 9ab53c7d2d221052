import json
import pickle
import subprocess
import sys

import pytest
from reasoning_gym.factory import DATASETS

from megatron_r1.config import component
from megatron_r1.config.sections import TaskSection
from megatron_r1.data.questions import question
from megatron_r1.data.tasks.reasoning_gym import BLOCK, ReasoningGym
from megatron_r1.errors import ConfigError

# One of each kind: arithmetic, several right answers, strings, grids; and two whose cost or cap depends on the size.
NAMES = ["chain_sum", "countdown", "caesar_cipher", "mini_sudoku", "word_ladder", "gsm_symbolic"]


def build(dataset: str, **options: object) -> ReasoningGym:
    task = component.build("task", {"type": "reasoning_gym", "dataset": dataset, "options": options})
    assert isinstance(task, ReasoningGym)
    return task


@pytest.mark.parametrize("name", NAMES)
def test_random_access_is_deterministic_and_the_reference_answer_is_right(name: str) -> None:
    task = build(name)
    problem = task.problem(seed=3, index=2 * BLOCK + 5)
    assert build(name).problem(seed=3, index=2 * BLOCK + 5) == problem
    asked = question(
        TaskSection(task={"type": "reasoning_gym", "dataset": name}, template="{question}"), name, "0", problem
    )
    carried = json.loads(json.dumps(asked.metadata))
    assert component.build("task", {"type": asked.task, **carried["config"]}).verify(asked, problem.answer) == 1.0
    assert task.verify(asked, "certainly not") < 1.0


def test_another_process_sees_the_same_problem() -> None:
    code = (
        "from megatron_r1.config import component;"
        "print(component.build('task', {'type': 'reasoning_gym', 'dataset': 'chain_sum'}).problem(7, 99).text)"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert seen.strip() == build("chain_sum").problem(7, 99).text


def test_neighbouring_seeds_share_no_problems() -> None:
    task = build("chain_sum", min_terms=6, max_terms=6, min_digits=4, max_digits=4)
    streams = [{task.problem(seed, index).text for index in range(200)} for seed in (0, 1, 2)]
    assert len(set().union(*streams)) == 600


def test_pickles_by_its_config() -> None:
    task = build("chain_sum", max_terms=3)
    assert pickle.loads(pickle.dumps(task)).problem(0, 1) == task.problem(0, 1)


def test_every_dataset_has_a_typed_config() -> None:
    assert len(DATASETS) > 100
    for name in ("zebra_puzzles", "sudoku", "propositional_logic", "fraction_simplification"):
        build(name)


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("chain_sums", {}, "no dataset 'chain_sums', did you mean 'chain_sum'"),
        ("chain_sum", {"max_term": 3}, "no option 'max_term', did you mean 'max_terms'"),
        ("chain_sum", {"seed": 3}, "'seed' is set by the task"),
        ("chain_sum", {"max_terms": "many"}, "max_terms: .*valid integer.*'many'"),
        ("chain_sum", {"min_terms": 5, "max_terms": 2}, "refuses its options: max_terms must be >= min_terms"),
    ],
)
def test_bad_options(dataset: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(dataset, **options)
