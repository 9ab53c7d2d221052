"""A share that was found once: what is exported is what the model holds then, whatever has become of its tensors."""

from collections.abc import Callable

import pytest
import torch

from megatron_r1.config.sections import ParallelSection
from megatron_r1.model.build import BuiltModel, build_model
from megatron_r1.model.parallel import initialize
from tests.model.conftest import section

NORM, BIAS = "model.norm.weight", "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture
def model() -> BuiltModel:
    initialize(ParallelSection(), seed=0)
    return build_model(section(), 128)


def exported(model: BuiltModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.export(torch.float32)}


def in_place(model: BuiltModel) -> None:
    with torch.no_grad():
        model.module.decoder.final_layernorm.weight.add_(1)


def data_elsewhere(model: BuiltModel) -> None:
    weight = model.module.decoder.final_layernorm.weight
    weight.data = weight.data + 1  # as an optimizer does that lays all of them into one buffer


def another_parameter(model: BuiltModel) -> None:
    norm = model.module.decoder.final_layernorm
    norm.weight = torch.nn.Parameter(norm.weight.detach() + 1)


def another_buffer(model: BuiltModel) -> None:
    router = model.module.decoder.layers[1].mlp.router
    router.expert_bias = router.expert_bias + 1


@pytest.mark.parametrize(
    ("change", "changed"),
    [(in_place, NORM), (data_elsewhere, NORM), (another_parameter, NORM), (another_buffer, BIAS)],
)
def test_what_is_exported_is_what_the_model_holds(
    model: BuiltModel, change: Callable[[BuiltModel], None], changed: str
) -> None:
    before = exported(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in exported(model).items())
    change(model)
    after = exported(model)
    assert after.keys() == before.keys()
    assert torch.equal(after[changed], before[changed] + 1)
    assert [name for name in before if not torch.equal(before[name], after[name])] == [changed]


def test_shares_are_found_once(model: BuiltModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the tensors are the model's own memory each time."""
    first = dict(model.export(torch.float32))
    monkeypatch.setattr(type(model.module), "sharded_state_dict", None)  # cannot be asked again
    again = dict(model.export(torch.float32))
    assert again[NORM].data_ptr() == first[NORM].data_ptr() == model.module.decoder.final_layernorm.weight.data_ptr()
    data_elsewhere(model)
    with pytest.raises(TypeError):  # but for those of a model that has changed
        dict(model.export(torch.float32))
