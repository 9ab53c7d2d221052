"""[guard]."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

import megatron_r1
from megatron_r1.config.guard import PHASES, GuardSection


def test_phases_are_those_that_runs_have() -> None:
    sources = Path(megatron_r1.__file__).parent.rglob("*.py")
    begun = {name for source in sources for name in re.findall(r'\bphase\("(\w+)"\)', source.read_text())}
    assert begun <= set(PHASES) <= begun


def test_a_misspelt_phase_is_refused() -> None:
    assert GuardSection.model_validate({"deadlines": {"rollout": 5}}).deadlines == {"rollout": 5.0}
    with pytest.raises(ValidationError, match="no phase is called rolout; there are start, data, rollout"):
        GuardSection.model_validate({"deadlines": {"rollout": 5, "rolout": 5}})
