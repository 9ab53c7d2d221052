"""Seeds of random streams, and what a response becomes."""

from megatron_r1.rollout.responses import Response, to_sample
from megatron_r1.seeds import stream_seed


def test_streams_are_apart_and_stable() -> None:
    seeds = {stream_seed(seed, prompt, sample) for seed in range(4) for prompt in range(64) for sample in range(16)}
    assert len(seeds) == 4 * 64 * 16
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert stream_seed(1, 2, 3) == 3751671686878481423


def test_sample_keeps_what_the_engine_gave() -> None:
    line = """{"prompt": 0, "sample": 1, "tokens": [7, 2], "logprobs": [-0.1, -0.2], "finish_reason": "stop",
               "weight_versions": ["4", "3"]}"""
    response = Response.model_validate_json(line)
    sample = to_sample(response, decode=str)
    assert (sample.tokens, sample.logprobs, sample.text) == ([7, 2], [-0.1, -0.2], "[7, 2]")
    assert sample.finished
    assert sample.weight_version == 3, "a response over an update counts as the older policy's"
    assert not to_sample(response.model_copy(update={"finish_reason": "length"}), decode=str).finished
