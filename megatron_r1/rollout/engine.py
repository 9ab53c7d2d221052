"""What a trainer asks of a rollout engine: token ids in, sampled token ids with their log-probabilities out.

Nothing is ever tokenised again: prompts arrive as ids, responses leave as the ids that were sampled, and text is made
only for the rewards to read.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_r1.types import Question, Sample

SAMPLE_PATH = "/megatron_r1/sample"
"""Route of samples, inside the server (`batch_route.py`)."""
BACKEND = "megatron_r1"
"""What our receiver of weights is called in vLLM (`receiver.py`)."""

PREFLIGHT = -1
"""Version of weights that are sent to see whether they arrive: one tensor, and more to come before anybody is asked."""

Decode = Callable[[list[int]], str]
"""Token ids -> text."""


@dataclass(frozen=True)
class Sampling:
    """How one batch of responses is drawn."""

    temperature: float
    top_p: float
    stop_token_ids: tuple[int, ...]
    """A response ends with (and contains) the first of these."""
    routed_experts: bool = False
    """Whether the engine says to which experts each token went."""


class Engine(Protocol):
    """Draws responses from the current policy and takes new weights in place."""

    def sample(
        self,
        prompts: Sequence[list[int]],
        *,
        n: int,
        seed: int,
        temperature: float | None = None,
        top_p: float | None = None,
        max_tokens: int | None = None,
    ) -> list[list[Sample]]:
        """`n` responses to each prompt; the same arguments and weights give bitwise the same responses.

        Args:
            prompts: token ids of each prompt. [prompts][tokens]
            n: responses to each prompt.
            seed: every response draws from a stream of its own, derived from this, the prompt's index and its own.
            temperature: `None` = the run file's, as for the next two.
            top_p: nucleus that tokens are drawn from.
            max_tokens: longest response, tokens; `None` = what the run file says for these weights.

        Returns:
            The samples of each prompt, `[prompts][n]`. Their log-probabilities are those of the distribution that was
            sampled from, after temperature and top-p: a trainer compares them with log-softmax(logits / temperature).

        Raises:
            DataError: a prompt leaves no room for a response.
            EngineError: the engine died, or did not answer in time.
        """
        ...

    def stream(
        self,
        prompts: Sequence[list[int]],
        *,
        n: int,
        seed: int,
        temperature: float | None = None,
        top_p: float | None = None,
        max_tokens: int | None = None,
        questions: Sequence[Question] | None = None,
    ) -> Iterator[tuple[int, list[Sample]]]:
        """As `sample`, but each prompt's number and samples as soon as these are complete, in any order.

        `questions`, one a prompt, are for an engine with tools, which may then answer within responses. Without them
        every response is one turn.
        """
        ...

    def update_weights(self, path: Path, version: int) -> None:
        """Replace the weights in place by those of a safetensors file, or folder of them, under Hugging Face names.

        Raises:
            EngineError: the engine died, refused them, or reports another version afterwards.
        """
        ...

    def close(self) -> None:
        """Stop every process of the engine; may be called more than once."""
        ...
