"""What [rollout] refuses, before any engine is started."""

from typing import Any

import pytest
from pydantic import ValidationError

from megatron_r1.config.engine_arguments import OURS
from megatron_r1.config.sections import RolloutSection


def section(**settings: Any) -> RolloutSection:
    return RolloutSection(**{"max_model_len": 64, "max_tokens": 32, **settings})


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("form", ["--{}=1", "--{} 1", "--{}"])
def test_arguments_that_the_run_gives(name: str, form: str) -> None:
    arguments = form.format(name).split()
    with pytest.raises(ValidationError, match=f"arguments: --{name} is for the run to give: "):
        section(arguments=["--tensor-parallel-size=2", *arguments])


def test_other_arguments() -> None:
    arguments = ["--tensor-parallel-size=2", "--max-num-batched-tokens=8192", "--all2all-backend=deepep_low_latency"]
    assert section(arguments=arguments).arguments == arguments


def test_an_engine_is_named_once() -> None:
    with pytest.raises(ValidationError, match="addresses names http://node2:1 twice"):
        section(addresses=["http://node1:1", "http://node2:1", "http://node2:1"])
