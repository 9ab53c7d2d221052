from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from megatron_r1.data.tasks.base import Problem
from megatron_r1.data.tasks.finite import FiniteTask


class Numbers(FiniteTask):
    name = "numbers"
    size = 0

    def __init__(self, size: int) -> None:
        super().__init__(self.Config())
        self.size = size

    def row(self, number: int) -> Problem:
        return Problem(f"say {number}", str(number))


@given(st.integers(1, 60), st.integers(0, 2**63 - 1), st.integers(0, 50))
def test_every_problem_comes_once_an_epoch(size: int, seed: int, epoch: int) -> None:
    task = Numbers(size)
    drawn = [task.problem(seed, index).answer for index in range(epoch * size, (epoch + 1) * size)]
    assert Counter(drawn) == {str(number): 1 for number in range(size)}


def test_order_depends_on_seed_and_epoch() -> None:
    task = Numbers(40)
    orders = {
        tuple(task.problem(seed, epoch * 40 + place).answer for place in range(40))
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


def test_any_problem_may_come_first() -> None:
    task = Numbers(10)
    firsts = Counter(task.problem(seed, 0).answer for seed in range(2000))
    assert len(firsts) == 10
    assert all(130 < count < 280 for count in firsts.values())  # 200 each; five standard deviations are 67
