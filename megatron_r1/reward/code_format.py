"""Code format reward: is the response in its tags, and is the answer's program in a block of its language?"""

from megatron_r1.config.section import Section
from megatron_r1.reward.base import Reward
from megatron_r1.reward.code_blocks import last_block
from megatron_r1.reward.format import well_formed
from megatron_r1.reward.response import Layout, extract_answer, response
from megatron_r1.types import Group, Question


class CodeFormat(Reward):
    """1.0 for a response in the form of the reward `format` whose answer has a fenced block of the language, else 0.0.

    open-r1's `code_format`. (Its regular expression has the faults that `format` tells of, and finds the block anywhere
    between the first `<answer>` and the last `</answer>`.)
    """

    class Config(Section):
        language: str | None = None
        """Label of the block, such as "python". Default: the language of the question's tests, else Python."""
        answer_in: Layout = "tags"

    def __call__(self, group: Group) -> list[float | None]:
        language = self.config.language or _language(group.question)
        return [self._score(response(group.question, sample), language) for sample in group.samples]

    def _score(self, text: str, language: str) -> float:
        if not well_formed(text, self.config.answer_in):
            return 0.0
        answer = extract_answer(text, self.config.answer_in) or ""
        return float(last_block(answer, language, unlabelled=False) is not None)


def _language(question: Question) -> str:
    tests = question.metadata.get("tests")
    return str(tests.get("language") or "python") if isinstance(tests, dict) else "python"
