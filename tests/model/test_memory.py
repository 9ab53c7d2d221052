"""Predicted memory against that of real tensors, in one process and on single ranks of layouts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_r1.config.sections import OptimSection, ParallelSection
from megatron_r1.model.build import BuiltModel, build_model
from megatron_r1.model.families import deepseek
from megatron_r1.model.memory import Shape, Work, predict, stages
from megatron_r1.model.parallel import initialize
from megatron_r1.optim.optimizer import make_trainable
from tests.model.conftest import MODEL, section
from tests.model.layout_program import LENGTH, ROWS, saved
from tests.model.test_flops import config_of

WITHIN = 0.05
NAMES = ("llama", "qwen2", "qwen3", "deepseek_v2_lite", "moonlight", "mixtral", "qwen3_moe_some_dense")
SELECTIVE = ("core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts")


def one(folder: Path, **changes: Any) -> tuple[BuiltModel, Any]:
    """A model, and what is predicted of it in one process."""
    initialize(ParallelSection(), seed=0)
    chosen = section(folder, **changes)
    built = build_model(chosen, 128)
    shape = Shape.of(json.loads((folder / "config.json").read_text()), chosen)
    return built, predict(shape, ParallelSection(), Work(1, ROWS, LENGTH, on_gpu=False))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_is_what_the_optimizer_holds(dtype: str) -> None:
    built, predicted = one(MODEL, dtype=dtype)
    assert sum(param.nbytes for param in built.module.parameters()) == predicted.weights
    trained = make_trainable(built, OptimSection(lr=1e-3), updates=10)
    [ddp] = trained.ddp
    tokens = torch.randint(400, (ROWS, LENGTH))
    ddp(tokens, torch.arange(LENGTH).expand_as(tokens), None, labels=tokens).sum().backward()
    ddp.finish_grad_sync()
    trained.optimizer.step()
    gradients = sum(buffer.grad_data.nbytes for buffer in [*ddp.buffers, *ddp.expert_parallel_buffers])
    assert gradients == pytest.approx(predicted.gradients, rel=WITHIN)
    own = {param.untyped_storage().data_ptr() for param in built.module.parameters()}
    kept = {}
    for adam in trained.optimizer.chained_optimizers:
        for param, state in adam.optimizer.state.items():
            for tensor in (param, *(value for value in state.values() if torch.is_tensor(value))):
                kept[tensor.untyped_storage().data_ptr()] = tensor.nbytes
    assert sum(size for place, size in kept.items() if place not in own) == pytest.approx(
        predicted.optimizer, rel=WITHIN
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_activations_are_what_autograd_saves(name: str, dtype: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of(name)))
    built, predicted = one(tmp_path, dtype=dtype, balance_loss_coef=0.0)
    assert saved(built.module) == pytest.approx(predicted.activations, rel=WITHIN)


@pytest.mark.parametrize("module", ["none", "full", *SELECTIVE])
def test_recomputed_activations_are_not_kept(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"recompute_granularity": "selective", "recompute_modules": [module]}
    if module == "full":
        options = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if module != "none":
        plain = deepseek.plain_modules
        monkeypatch.setattr(deepseek, "plain_modules", lambda section: plain(section) | options)
    built, predicted = one(MODEL, balance_loss_coef=0.0)
    assert saved(built.module) == pytest.approx(predicted.activations, rel=WITHIN)


CASES: dict[str, list[tuple[dict[str, Any], int, int]]] = {
    "deepseek": [
        ({"tensor": 2}, 2, 1),
        ({"expert": 2}, 4, 3),
        ({"tensor": 2, "expert": 2, "expert_tensor": 2}, 4, 0),
        *(({"pipeline": 3}, 3, rank) for rank in range(3)),
        *(({"pipeline": 2, "pipeline_layout": "Et|ttmL"}, 2, rank) for rank in range(2)),
        *(({"pipeline": 2, "virtual_pipeline": 2, "pipeline_layout": "E|t|tt|mL"}, 2, rank) for rank in range(2)),
    ],
    "qwen3": [
        ({"tensor": 3}, 3, 0),
        *(({"pipeline": 2}, 2, rank) for rank in range(2)),
    ],
    "llama_tied": [({"pipeline": 2}, 2, rank) for rank in range(2)],
}


@pytest.mark.parametrize("name", CASES)
def test_ranks_of_layouts(name: str, tmp_path: Path) -> None:
    hf = json.loads((MODEL / "config.json").read_text()) if name == "deepseek" else config_of(name)
    (tmp_path / "config.json").write_text(json.dumps(hf))
    command = [sys.executable, "-m", "tests.model.layout_program", str(tmp_path), json.dumps(CASES[name])]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    shape = Shape.of(hf, section(tmp_path, balance_loss_coef=0.0))
    for (parallel, processes, rank), (weights, kept) in zip(CASES[name], json.loads(done.stdout), strict=True):
        chosen, work = ParallelSection(**parallel), Work(processes, ROWS, LENGTH, on_gpu=False)
        predicted = predict(shape, chosen, work, rank * chosen.pipeline // processes)
        assert predicted.weights == weights, (parallel, rank)
        if kept is not None:
            assert kept == pytest.approx(predicted.activations, rel=WITHIN), (parallel, rank)


def test_deepseek_v3_by_hand() -> None:
    """1,024 GPUs, TP 2, PP 8 with 4 virtual stages, EP 64: 4 experts a layer. Layers 0 to 2 are dense."""
    hf = json.loads((Path(__file__).parents[1] / "convert/deepseek_v3.json").read_text())
    parallel = ParallelSection(
        tensor=2, pipeline=8, virtual_pipeline=4, expert=64, pipeline_layout="Et|" + "tt|" * 30 + "mL"
    )
    shape = Shape.of(hf)
    assert [len(stage.layers) for stage in stages(shape.config, parallel)] == [7, *[8] * 6, 6]
    second = predict(shape, parallel, Work(1024, 1, 4096, 128), rank=1)
    attention = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    dense = 8 * ((attention + 3 * 7168 * 2048) / 2 + 7168 * 256 + 2 * 7168 + 1536 + 512)
    dense -= 2 * (7168 * 256 + 3 * 7168 * 2048 / 2 - 3 * 7168 * 18432 / 2)  # layers 1 and 2
    experts = 6 * 4 * 3 * 7168 * 2048
    assert second.weights == pytest.approx(2 * (dense + experts))
    assert second.gradients == pytest.approx(4 * (dense + experts))
    assert second.optimizer == pytest.approx(12 * (dense / 64 + experts / 2))
    one_row = predict(shape, parallel, Work(1024, 1, 4096, 1), rank=1).activations
    assert second.activations == pytest.approx(one_row * (2 * 6 + 3 * 8 + 1) / 4)


def test_a_pipeline_holds_as_many_microbatches_as_stages_follow() -> None:
    hf = json.loads((MODEL / "config.json").read_text()) | {"num_hidden_layers": 4, "first_k_dense_replace": 0}
    shape, parallel = Shape.of(hf), ParallelSection(pipeline=4)
    kept = [
        [predict(shape, parallel, Work(4, 1, 64, count), rank).activations for rank in range(3)] for count in (1, 2, 9)
    ]
    assert [[bytes_ / kept[0][0] for bytes_ in ranks] for ranks in kept] == [[1, 1, 1], [2, 2, 2], [4, 3, 2]]
