"""What crosses package borders: questions, samples, groups.

A worked example, one question answered by a group of two::

    question = Question(id="chain_sum-7", task="reasoning_gym", prompt="... User: 3 + 4 - 2? Assistant:",
                        answer="5", metadata={"dataset": "chain_sum", "entry": {...}})
    good = Sample(tokens=[41, 7, 2], logprobs=[-0.1, -0.4, 0.0], text="<think>3+4=7 ...</answer>",
                  finished=True, weight_version=12)
    bad = Sample(tokens=[41, 9, 2], logprobs=[-0.1, -2.3, 0.0], text="<think>...", finished=True,
                 weight_version=12)
    group = Group(question, prompt_tokens=[1, 88, 90], samples=[good, bad])
    judge([group])               # fills sample.rewards = {"accuracy": 1.0, "format": 1.0}, sample.reward = 2.0
    estimate([group])            # fills sample.advantages = [+1.0, +1.0, +1.0] and [-1.0, -1.0, -1.0]
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Question:
    """One prompt with what is needed to judge an answer to it."""

    id: str
    task: str
    """Registry name of the task that made it (and that can verify an answer)."""
    prompt: str
    """The full text the policy continues, template included."""
    answer: str
    """Reference answer."""
    metadata: dict[str, Any] = field(default_factory=dict)
    rewards: tuple[str, ...] | None = None
    """Names in the run's [rewards] that score it; None = all."""
    tools: tuple[str, ...] | None = None
    """Names in the run's [conversation.tools] that an answer may call; None = all."""

    @property
    def member(self) -> str:
        """The name that its task has in a mixture, else `task`."""
        return str(self.metadata.get("member", self.task))


@dataclass
class Sample:
    """One response of the policy to a question.

    A response in which tools have answered holds their replies among its tokens. What is known of tokens one by one is
    known of those that were sampled, so `[sampled]` is shorter than `[response]` there and the same elsewhere.
    """

    tokens: list[int]
    """Response token ids as the engine sampled them, end-of-sequence included when it was sampled. [response]"""
    logprobs: list[float]
    """The engine's log-probability of each sampled token, nats. [sampled]"""
    text: str
    finished: bool
    """True when the response ended by itself, False when it was cut at the length limit."""
    weight_version: int
    """Version of the oldest weights that generated some of it."""
    rewards: dict[str, float | None] = field(default_factory=dict)
    """Each reward part by name, before weighting; None = not applicable."""
    reward: float = 0.0
    """Weighted sum of the parts."""
    correct: bool | None = None
    """Whether the answer is right; None where no reward of the question judges that."""
    step_marks: list[tuple[int, float]] = field(default_factory=list)
    """Reasoning steps as a reward marks them: (characters of `text` up to the step's end, reward), in order."""
    step_rewards: list[tuple[int, float]] = field(default_factory=list)
    """The same by tokens: (number of the step's last sampled token, reward)."""
    values: list[float] | None = None
    """The critic's value before each token, where a run has a critic. [sampled]"""
    advantages: list[float] = field(default_factory=list)
    """[sampled]"""
    trainer_logprobs: list[float] | None = None
    """The trainer's log-probability of each token under the policy that sampled it, once it is computed, nats.
    [sampled]"""
    weight_spans: list[tuple[int, int]] = field(default_factory=list)
    """Which weights generated which tokens: (version, sampled tokens up to its last one), in order; empty =
    `weight_version` all of them."""
    routed_experts: "np.ndarray | None" = field(default=None, compare=False)
    """The experts that the engine sent each token of prompt and response to, the last one excepted, which it was not
    fed; uint8 or int16, dense layers' numbers mean nothing. None = not recorded. [tokens - 1, layers, experts]"""
    mask: list[bool] = field(default_factory=list)
    """False = a tool's token, which nothing is learned from; empty = the policy sampled all. [response]"""
    answer_from: int = 0
    """Characters of `text` before the message that holds the answer: calls outside the reasoning, and their replies."""

    @property
    def length(self) -> int:
        """Tokens that the policy sampled."""
        return sum(self.mask) if self.mask else len(self.tokens)


@dataclass
class Group:
    """All samples of one question: the unit that is scored and normalised together."""

    question: Question
    prompt_tokens: list[int]
    samples: list[Sample]
