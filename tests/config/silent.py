"""A task that says nothing about how it is scored."""

from megatron_r1.data.tasks.base import Problem, Task


class Silent(Task):
    name = "silent"

    def problem(self, seed: int, index: int) -> Problem:
        return Problem("?", "")
