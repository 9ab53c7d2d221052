"""Layouts that cannot be: an error of the user's on every rank, with the numbers, before anything is built."""

import re
from typing import Any

import pytest

from tests.distributed.layouts import Launcher, parts

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, ...]]] = {
    "processes": ({"processes": 3, "tensor": 2}, {}, (2, 3)),
    "experts_over_processes": ({"processes": 2, "expert": 4}, {}, (4, 2)),
    "heads": ({"tensor": 3}, {}, (4, 3)),
    "experts": ({"processes": 3, "expert": 3}, {}, (8, 3)),
    "layers": ({"pipeline": 3}, {}, (4, 3)),
    "virtual_stages": ({"pipeline": 2, "virtual_pipeline": 3}, {}, (4, 2, 3)),
    "pipeline_layout": ({"pipeline": 2, "pipeline_layout": "Et*2|tmL"}, {}, (4, 3)),
    "lora": ({"tensor": 2}, {"section": {"lora": {"rank": 2}, "mtp_loss_coef": 0.0}}, ()),
}
"""Name -> [parallel], changes to the part, the numbers that the error has to name."""

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_with_its_arithmetic(launcher: Launcher, name: str) -> None:
    layout, changes, numbers = REFUSED[name]
    seen = launcher.run(f"bad_{name}", layout, parts("build", **changes))["build"].seen
    assert "refused" in seen
    assert set(map(str, numbers)) <= set(re.findall(r"\d+", seen["refused"])), seen["refused"]
    assert ("lora" if name == "lora" else "[parallel]") in seen["refused"]


def test_what_fits_is_not_refused(launcher: Launcher) -> None:
    assert "refused" not in launcher.run("good", {"tensor": 2}, parts("build"))["build"].seen
