"""`rollout.max_tokens` that changes by step: each response may be as long as the step of its weights says."""

from pathlib import Path

import pytest

from megatron_r1.seeds import stream_seed
from tests.rollout.scripted_server import response
from tests.rollout.test_engine_faults import PROMPTS, Open, opened, push, tokens  # noqa: F401
from tests.rollout.test_flow import flowing, seeds, submit

CHANGING = [{"value": 3, "until_step": 2}, {"value": 50}]


@pytest.mark.parametrize("dispatch", ["batch", "continuous"])
def test_of_a_batch_it_is_that_of_the_newest_weights(opened: Open, tmp_path: Path, dispatch: str) -> None:  # noqa: F811
    """A run that goes on begins by pushing the weights of its step, as with 5 here."""
    fleet = opened(engines=1, dispatch=dispatch, max_tokens=CHANGING)
    for version, longest in ((0, 3), (5, 50), (1, 3), (2, 50)):
        push(fleet, tmp_path, version)
        said = [response(stream_seed(7, 0, sample), version, longest)["tokens"] for sample in range(2)]
        assert tokens(fleet.sample(PROMPTS[:1], n=2, seed=7)) == [said]
        assert fleet.requests(0)[-1]["max_tokens"] == [longest]
    assert fleet.sample(PROMPTS[:1], n=1, seed=7, max_tokens=4)[0][0].length == 4


def test_of_a_flow_it_is_that_of_the_weights_that_begin_a_group(opened: Open, tmp_path: Path) -> None:  # noqa: F811
    fleet = opened(engines=1, dispatch="continuous", max_tokens=CHANGING)
    with flowing(fleet) as told:
        submit(told.flow, 0, at_least=1)
        submit(told.flow, 1, at_least=2)
        push(fleet, tmp_path, 2)
        told.until(lambda: len(told.complete) == 2)
    # The engine may get the first one's request only when it has the new weights, as the second's.
    assert sorted(request["max_tokens"] for request in fleet.requests(0)) == [[3], [50]]
    for number, longest in enumerate((3, 50)):
        answers = [sample.tokens for sample in told.complete[f"data:{number}"]]
        assert answers == [response(seed, 2, longest)["tokens"] for seed in seeds(number)]
