"""General prompts: nothing to verify, so only the form and the language of the response are scored."""

from typing import ClassVar

from megatron_r1.config.section import Component
from megatron_r1.data.records import Row
from megatron_r1.data.tasks.base import Problem
from megatron_r1.data.tasks.records import RecordsTask


class General(RecordsTask):
    """Prompts without a reference answer. A reward model, where a run has one, is another entry of its [rewards]."""

    required: ClassVar[tuple[str, ...]] = ("prompt",)
    default_rewards: ClassVar[dict[str, Component]] = {
        "format": {"type": "format"},
        "language_consistency": {"type": "language_consistency"},
    }

    def parse(self, row: Row) -> Problem:
        return Problem(row.text("prompt").strip(), answer="")
