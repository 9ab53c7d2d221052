"""What a tool is: it finds a call in what the model has said, and answers it."""

from abc import ABC, abstractmethod
from typing import Any

from pydantic import field_validator

from megatron_r1.config.section import Section
from megatron_r1.types import Question


class Tool(ABC):
    """Answers calls. A section of [conversation.tools] names a subclass by `type`; its other keys fill `Config`.

    A turn stops at `end`, so the model never writes a reply itself. `run` is called from several threads at once. For
    responses that repeat bit for bit it has to give the same output for the same call.
    """

    class Config(Section):
        """How calls and replies are written; a subclass with keys of its own derives from this."""

        begin: str = "<tool_call>"
        """Text before a call."""
        end: str = "</tool_call>"
        """Text behind it, at which a turn stops; empty = at none, for a class whose `find` waits for whole messages."""
        result: str = "\n<tool_response>\n{output}\n</tool_response>\n"
        """What is appended to a call, the tool's output in the place of `{output}`. With a chat template it ends the
        assistant's message and begins the next."""

        @field_validator("result")
        @classmethod
        def _has_a_place(cls, result: str) -> str:
            if "{output}" not in result:
                raise ValueError("`result` has no place for {output}, so the model would not see it")
            return result

    def __init__(self, config: Any) -> None:
        self.config = config

    def find(self, said: str, ended: bool, question: Question) -> str | None:
        """The call that a turn ends with; None = there is none, and a message that has ended is the last one.

        Args:
            said: what the model has said since the last reply.
            ended: the turn ended by itself, not at an `end`. A class that replies to whole messages of the model, as
                an environment or a user does, waits for this.
            question: what is being answered.
        """
        if not (self.config.begin and self.config.end):
            return None
        _, begun, rest = said.rpartition(self.config.begin)
        call, closed, after = rest.partition(self.config.end)
        return call if begun and closed and not after.strip() else None

    @abstractmethod
    def run(self, call: str, question: Question) -> str:
        """The output for a call that `find` has found, in an answer to a question.

        Whatever it raises is told to the model as the tool's output, but for a `UserError`, which ends the run.
        """

    def prepare(self) -> None:  # noqa: B027 (most tools need nothing)
        """Start what calls need, so that what is missing is found before a run begins.

        Raises:
            UserError: says what is missing.
        """

    def close(self) -> None:  # noqa: B027
        """End it; may be called more than once."""
