"""Responses that were cut, and what is added to them."""

import pytest

from megatron_r1.rollout.engine import Sampling
from megatron_r1.rollout.refill import Asked
from megatron_r1.rollout.responses import Response, joined
from megatron_r1.seeds import stream_seed


def part(tokens: list[int], versions: list[int], ends: list[int], reason: str = "abort") -> Response:
    return Response.model_validate(
        {
            "prompt": 0,
            "sample": 0,
            "tokens": tokens,
            "logprobs": [-0.1 * token for token in tokens],
            "finish_reason": reason,
            "weight_versions": versions,
            "version_ends": ends,
        }
    )


@pytest.mark.parametrize(
    ("begun", "rest", "versions", "ends"),
    [
        (part([5, 6], [3], [2]), part([7, 2], [4], [2], "stop"), [3, 4], [2, 4]),
        (part([5, 6], [3], []), part([7, 2], [3, 4], [1, 2], "stop"), [3, 4], [3, 4]),
        (part([5, 6], [2, 3], [1, 2]), part([7, 2], [3], [], "stop"), [2, 3], [1, 4]),
        (part([5, 6], [3], [2]), part([], [4], [0]), [3], [2]),
        (part([5, 6], [3], [2]), part([], [], []), [3], [2]),
    ],
)
def test_each_token_keeps_its_weights(begun: Response, rest: Response, versions: list[int], ends: list[int]) -> None:
    whole = joined(begun, rest)
    assert whole.tokens == begun.tokens + rest.tokens
    assert whole.logprobs == begun.logprobs + rest.logprobs
    assert (whole.weight_versions, whole.version_ends) == (versions, ends)
    assert whole.finish_reason == rest.finish_reason
    assert joined(None, rest) is rest


class Nobody:
    """Waits for no answer."""

    def sent(self, name: int | str, version: int) -> None: ...

    def complete(self, name: int | str, responses: list[Response]) -> None: ...

    def fail(self, error: Exception) -> None: ...


def test_what_was_cut_is_asked_for_from_there_with_numbers_of_its_own() -> None:
    asked = Asked(Nobody(), "a", [1, 2], [10, 11, 12], 20, Sampling(1.0, 1.0, (2,)))
    whole = asked.rest([0, 2])
    assert (whole.prompts, whole.seeds, whole.max_tokens) == ([[1, 2]], [[10, 12]], [20])
    asked.begun[2] = part([5, 6], [3], [2])
    assert asked.rest([0, 1]).prompts == [[1, 2]], "of these none was begun"
    rest = asked.rest([0, 2])
    assert (rest.prompts, rest.max_tokens) == ([[1, 2], [1, 2, 5, 6]], [20, 18])
    assert rest.seeds == [[10], [stream_seed(12, "resumed", 2)]]
