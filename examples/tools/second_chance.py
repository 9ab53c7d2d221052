"""A user as a tool: who answers wrong is told so, once or more often, and may answer again."""

import re

from megatron_r1.rollout.tools.base import Tool
from megatron_r1.types import Question


class SecondChance(Tool):
    """Replies to messages with a wrong answer; a right one, or none at all, ends the conversation."""

    class Config(Tool.Config):
        begin: str = ""
        end: str = ""
        result: str = "\nUser: {output} Assistant:"

    def find(self, said: str, ended: bool, question: Question) -> str | None:
        answers = re.findall(r"<answer>(.*?)</answer>", said) if ended else []
        return answers[-1] if answers and answers[-1].strip() != question.answer else None

    def run(self, call: str, question: Question) -> str:
        return f"{call.strip()} is wrong. Try again."
