import random
from calendar import isleap

from megatron_r1.data.tasks.base import Problem, Task
from megatron_r1.types import Question


class LeapYears(Task):
    name = "leap_years"
    template = "r1_zero_short"
    default_rewards = {"task": {"type": "task"}, "format": {"type": "format"}}

    def problem(self, seed: int, index: int) -> Problem:
        year = random.Random(f"{seed}/{index}").randint(1600, 2400)
        return Problem(f"Is {year} a leap year, yes or no?", "yes" if isleap(year) else "no")

    def verify(self, question: Question, answer: str) -> float:
        return float(answer.strip().lower() == question.answer)
