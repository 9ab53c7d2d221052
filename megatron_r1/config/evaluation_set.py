"""What must not be trained on: a section of `data decontaminate` and of `collect`."""

from pydantic import Field, model_validator

from megatron_r1.config.component import TaskComponent
from megatron_r1.config.records import RecordsSection
from megatron_r1.config.section import Section


class EvaluationSetSection(Section):
    """[evaluation.NAME] of `data decontaminate`, [decontaminate.evaluation.NAME] of `collect`: what must not be trained
    on; the texts of a data set, or the problems of a task.
    """

    data: RecordsSection | None = None
    text: list[str] = Field(default=["problem"], min_length=1)
    """Columns of `data` with the texts."""
    task: TaskComponent | None = None
    """A task with a fixed number of problems, such as `{ type = "human_eval" }`."""

    @model_validator(mode="after")
    def _one_origin(self) -> "EvaluationSetSection":
        if (self.data is None) == (self.task is None):
            raise ValueError("an evaluation set needs either `data` or `task`")
        return self
