"""Model-judge reward: a model compares the final answer with the reference, where no rule can.

DeepSeek-R1 (arXiv 2501.12948 v2, B.3.3) judges rejection-sampled answers so: question, ground truth and response in,
JSON with an analysis and `correct` or `incorrect` out.
"""

from collections import Counter
from collections.abc import Callable
from functools import cached_property
from typing import ClassVar, Literal

from megatron_r1.config.chat_endpoint import PromptedEndpointSection
from megatron_r1.reward.base import Reward, Scores
from megatron_r1.reward.chat_endpoint import ChatEndpoint, Verdict
from megatron_r1.reward.prompt import Prompt
from megatron_r1.reward.response import AnswerIn, extract_answer, response
from megatron_r1.types import Group


class Correctness(Verdict):
    """The judge's answer; it reasons before it decides."""

    analysis: str
    correctness: Literal["correct", "incorrect"]


class ModelJudge(Reward):
    """1.0 where the judge calls the answer correct, 0.0 where it calls it incorrect or there is no final answer.

    None where the question has no reference answer, and where the judge failed (see `ChatEndpoint`).
    """

    class Config(PromptedEndpointSection):
        answer_in: AnswerIn = "tags"

    judges_correctness: ClassVar[bool] = True
    may_fail: ClassVar[bool] = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._prompt = Prompt(config.prompt, "correctness", ("question", "answer", "response"))
        self._endpoint = ChatEndpoint(config)

    @cached_property
    def counters(self) -> Counter[str]:
        return self._endpoint.counters

    def prepare(self) -> None:
        self._endpoint.prepare()

    def __call__(self, group: Group) -> Scores:
        return self.begin(group)()

    def begin(self, group: Group) -> Callable[[], Scores]:
        question = group.question
        if not question.answer:
            return lambda: [None] * len(group.samples)
        asked = question.metadata.get("text", question.prompt)
        answers = [extract_answer(response(question, sample), self.config.answer_in) for sample in group.samples]
        # The same answer is judged once: cheaper, and the samples of a group are judged alike.
        futures = {
            answer: self._endpoint.ask(
                self._prompt.messages(question=asked, answer=question.answer, response=answer), Correctness
            )
            for answer in dict.fromkeys(answers)
            if answer is not None
        }

        def score(answer: str | None) -> float | None:
            if answer is None:
                return 0.0
            verdict = futures[answer].result()
            return None if verdict is None else float(verdict.correctness == "correct")

        return lambda: [score(answer) for answer in answers]
