"""Questions by how they were answered: weights by hand, draws by seed and history."""

import json

import pytest

from megatron_r1.config.curriculum import CurriculumSection
from megatron_r1.data.pass_rates import PassRates
from megatron_r1.types import Group, Question, Sample


def asked(text: str, **metadata: str) -> Question:
    return Question(f"math-{len(text)}", "math", f"Solve {text}", "5", {"text": text, **metadata})


def answered(question: Question, *verdicts: bool | None) -> Group:
    return Group(question, [1], [Sample([1], [0.0], "", True, 0, correct=verdict) for verdict in verdicts])


def rates(**keys: object) -> PassRates:
    return PassRates(CurriculumSection.model_validate(keys), seed=3)


def test_weights_by_hand() -> None:
    """Bounds are not inside; verdicts that nobody could give do not count."""
    known = rates(low=0.25, high=0.75, floor=0.2)
    verdicts = {
        "never": [False] * 4,
        "at low": [True, False, False, False],
        "between": [True, False, None, None],
        "at high": [True, True, True, False],
        "not judged": [None] * 4,
    }
    for text, said in verdicts.items():
        known.note(answered(asked(text), *said))
    assert [known.rate(asked(text)) for text in verdicts] == [0.0, 0.25, 0.5, 0.75, None]
    assert [known.weight(asked(text)) for text in verdicts] == [0.2, 0.2, 1.0, 0.2, 1.0]
    assert known.weight(asked("new")) == 1.0


def test_the_last_groups_count_each_by_its_answers() -> None:
    known, question = rates(window=2), asked("x")
    for said in ([True] * 4, [False] * 4, [True, False]):
        known.note(answered(question, *said))
    assert known.rate(question) == 1 / 6
    known.note(answered(question, True, True))
    assert known.rate(question) == 3 / 4


def test_a_question_is_its_text_and_its_task_or_all_of_a_difficulty() -> None:
    known = rates()
    known.note(answered(asked("x"), True))
    assert known.rate(Question("other-7", "math", "elsewhere", "5", {"text": "x"})) == 1.0
    assert known.rate(asked("x", member="algebra")) is None
    levels = rates(by="difficulty", window=100)
    levels.note(answered(asked("x", difficulty="3"), True, True))
    levels.note(answered(asked("y", difficulty="3"), False, False))
    assert levels.rate(asked("z", difficulty="3")) == 0.5
    assert levels.rate(asked("x", difficulty="4")) is None


def test_draws_are_in_the_share_of_the_weight_and_repeat() -> None:
    known, question = rates(floor=0.25), asked("x")
    assert all(known.asks(question, "data", position) for position in range(100))
    known.note(answered(question, True))
    drawn = [known.asks(question, "data", position) for position in range(4000)]
    assert 900 < sum(drawn) < 1100
    again = rates(floor=0.25)
    again.restore(json.loads(json.dumps(known.state())))
    assert [again.asks(question, "data", position) for position in range(4000)] == drawn
    assert [known.asks(question, "general", position) for position in range(4000)] != drawn
    other = PassRates(CurriculumSection(floor=0.25), seed=4)
    other.restore(known.state())
    assert [other.asks(question, "data", position) for position in range(4000)] != drawn


def test_bounds_that_hold_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"low 0\.5 is not below high 0\.5"):
        CurriculumSection(low=0.5, high=0.5)
