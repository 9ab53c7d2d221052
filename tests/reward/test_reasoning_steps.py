import pytest

from tests.reward.shape_samples import score, thought

LIST = "1. add the two\n2. halve the sum\n3. compare"


@pytest.mark.parametrize(
    ("reasoning", "steps"),
    [
        ("", 0),
        ("I just know it.", 0),
        ("Step 1: add. Step 2 is missing its colon.", 1),
        ("Step 1: add\nStep 2: halve\nstep 3. compare\nStep 4: done", 3),
        (LIST, 3),
        ("  1) add\n  2) halve", 2),
        ("- add\n* halve\n• compare", 3),
        ("First, I add. Second, I halve.", 2),
        ("x = 3. 14 is not a step, nor is 2.5\n-5 is a number", 0),
    ],
)
def test_a_third_for_each_step(reasoning: str, steps: int) -> None:
    assert score("reasoning_steps", thought(reasoning)) == [pytest.approx(steps / 3)]


def test_only_the_reasoning_counts() -> None:
    assert score("reasoning_steps", f"{LIST} <think>no steps</think> {LIST}", LIST) == [0.0, 0.0]


def test_how_many_are_enough() -> None:
    assert score("reasoning_steps", thought(LIST), enough=6) == [0.5]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LIST, 1 / 3),  # without MULTILINE only the first line of a list counts
        (thought(LIST), 0.0),
        ("First,First,First,", 1.0),
        ("a\n- b\n* c", 2 / 3),
        ("", 0.0),
    ],
)
def test_open_r1(text: str, expected: float) -> None:
    assert score("reasoning_steps", text, compatible="open-r1") == [pytest.approx(expected)]
