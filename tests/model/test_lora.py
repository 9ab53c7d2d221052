"""LoRA against the model without it, against plain torch on one layer, and against transformers once merged."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from transformers import AutoModelForCausalLM

from megatron_r1.checkpoint.store import Checkpoints
from megatron_r1.checkpoint.torch_dist import TorchDistReader
from megatron_r1.config.checkpoint import CheckpointSection
from megatron_r1.config.sections import LoraSection, OptimSection, ParallelSection
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.loss.cross_entropy import CrossEntropy
from megatron_r1.model import hf_folder
from megatron_r1.model.build import BuiltModel, build_model
from megatron_r1.model.lora import Adapter, adapters, size, without_adapters
from megatron_r1.model.mapping import frozen, weights
from megatron_r1.model.parallel import initialize
from megatron_r1.model.placement import ParameterCounts
from megatron_r1.train.batch import from_rows
from megatron_r1.train.policy import Policy
from megatron_r1.train.reference import Reference
from tests.model.conftest import section
from tests.model.dense_models import write_dense

EVERYWHERE = LoraSection(rank=4, alpha=8.0, targets=["attention", "mlp", "experts"])
TOKENS = torch.randint(400, (2, 33), generator=torch.Generator().manual_seed(5))


def build(folder: Path, lora: LoraSection | None = EVERYWHERE, **changes: object) -> BuiltModel:
    initialize(ParallelSection(), seed=3)
    values = {"load_weights": True, "mtp_loss_coef": 0.0, "balance_loss_coef": 0.0, "bias_update_rate": 0.0}
    return build_model(section(folder, **(values | changes), lora=lora), 64)


def policy_of(folder: Path, **changes: Any) -> Policy:
    return Policy(build(folder, **changes), OptimSection(lr=3e-2, weight_decay=0.0), updates=10)


def train(policy: Policy, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        rows = torch.randint(400, (2, 33), generator=torch.Generator().manual_seed(step))
        policy.step([from_rows(rows[:, :-1], rows[:, 1:], 64)], CrossEntropy())


@torch.no_grad()
def logits(model: BuiltModel) -> torch.Tensor:
    """[rows, seq, vocab]"""
    found: list[torch.Tensor] = []
    handle = model.module.output_layer.register_forward_hook(lambda m, args, output: found.append(output[0].clone()))
    tokens = TOKENS[:, :-1]
    model.module.eval()(tokens, torch.arange(32).expand(2, -1), None, labels=TOKENS[:, 1:])
    handle.remove()
    return found[-1].transpose(0, 1)


def test_an_untrained_adapter_changes_no_bit(exported: Path) -> None:
    base, adapted = build(exported, lora=None), build(exported)
    assert len(adapters(adapted.module)) == 3 * 5 + 2 + 2 * 2 * (8 + 1)
    assert torch.equal(logits(base), logits(adapted))
    for (name, tensor), (other, merged) in zip(base.export(torch.float32), adapted.export(torch.float32), strict=True):
        assert name == other
        assert torch.equal(tensor, merged), name


def test_trained_adapters_merged_are_the_same_model_in_transformers(exported: Path, tmp_path: Path) -> None:
    policy = policy_of(exported)
    base = logits(policy.model)
    train(policy, 0, 4)
    ours = logits(policy.model)
    assert (ours - base).abs().max() > 0.1
    hf_folder.write(tmp_path / "hf", policy.model.hf, policy.model.export(torch.float32))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    torch.testing.assert_close(ours, theirs(TOKENS[:, :-1]).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "qwen3"])
def test_so_are_those_of_a_dense_model(tmp_path: Path, name: str) -> None:
    """Queries, keys and values share an adapter in Megatron, and are three matrices in transformers."""
    write_dense(tmp_path / "base", name)
    lora = LoraSection(rank=2, alpha=4.0)
    policy = policy_of(tmp_path / "base", lora=lora)
    minibatch = [from_rows(TOKENS[:, :-1] % 120, TOKENS[:, 1:] % 120, 64)]
    for _ in range(3):
        policy.step(minibatch, CrossEntropy())
    assert len(adapters(policy.model.module)) == 2 * 4
    hf_folder.write(tmp_path / "hf", policy.model.hf, policy.model.export(torch.float32))
    base, merged = (
        AutoModelForCausalLM.from_pretrained(tmp_path / part, dtype=torch.float32) for part in ("base", "hf")
    )
    loss, start = (model(TOKENS % 120, labels=TOKENS % 120).loss.item() for model in (merged, base))
    assert policy.evaluate(minibatch, CrossEntropy())["loss"] == pytest.approx(loss, abs=1e-5)
    assert loss < start - 0.01


def test_weights_are_merged_when_it_is_their_turn(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once would be a second model in memory."""
    made: list[weakref.ref[torch.Tensor]] = []
    original = Adapter.merged

    def noted(adapter: Adapter, weight: torch.Tensor) -> torch.Tensor:
        whole = original(adapter, weight)
        made.append(weakref.ref(whole))
        return whole

    monkeypatch.setattr(Adapter, "merged", noted)
    model, most = build(exported), 0
    for _, tensor in model.export(torch.float32):
        del tensor
        most = max(most, sum(one() is not None for one in made))
    assert (len(made), most) == (len(adapters(model.module)), 1)


def test_nothing_but_adapters_is_trained(exported: Path) -> None:
    policy = policy_of(exported)
    module = policy.model.module
    before = {name: tensor.clone() for name, tensor in weights(module).items()}
    train(policy, 0, 3)
    after, frozen = weights(module), without_adapters(before)
    assert [name for name in frozen if not torch.equal(after[name], before[name])] == []
    moved = [name for name in before if name not in frozen and not torch.equal(after[name], before[name])]
    assert len(moved) > 0.9 * 2 * len(adapters(module))  # an expert may not have been chosen
    trained = sum(param.numel() for param in module.parameters() if param.requires_grad)
    held = sum(param.numel() for group in policy.trainable.optimizer.param_groups for param in group["params"])
    assert held == trained < 0.5 * sum(param.numel() for param in module.parameters())


def test_gradients_are_those_of_the_formula(exported: Path) -> None:
    """One layer's W x + alpha / r B A x in plain torch, from the input and output gradient that the layer saw."""
    model = build(exported)
    layer = model.module.decoder.layers[1].self_attention.linear_proj
    torch.nn.init.normal_(layer.lora.b, std=0.05)
    seen: dict[str, torch.Tensor] = {}

    def watch(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, None]) -> None:
        seen.update(x=args[0].detach(), y=output[0])
        output[0].retain_grad()

    layer.register_forward_hook(watch)
    model.module(TOKENS[:, :-1], torch.arange(32).expand(2, -1), None, labels=TOKENS[:, 1:]).mean().backward()
    a, b = (tensor.detach().clone().requires_grad_() for tensor in (layer.lora.a, layer.lora.b))
    expected = seen["x"] @ layer.weight.T + (8.0 / 4) * (seen["x"] @ a.T) @ b.T
    torch.testing.assert_close(seen["y"], expected, atol=1e-5, rtol=1e-5)
    (expected * seen["y"].grad).sum().backward()
    torch.testing.assert_close(layer.lora.a.grad, a.grad, atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(layer.lora.b.grad, b.grad, atol=1e-7, rtol=1e-4)
    assert a.grad.abs().max() > 1e-4
    assert layer.weight.grad is None


def test_a_resumed_run_reaches_the_same_bits(exported: Path, tmp_path: Path) -> None:
    whole = policy_of(exported)
    train(whole, 0, 4)
    stopped, checkpoints = policy_of(exported), Checkpoints(tmp_path, CheckpointSection(), {"seed": 0})
    train(stopped, 0, 2)
    checkpoints.save(2, stopped.trainable, {}, {})
    resumed = policy_of(exported)
    checkpoints.load(2, resumed.trainable, {})
    train(resumed, 2, 2)
    ours, theirs = weights(resumed.model.module), weights(whole.model.module)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_the_reference_is_the_base_until_it_is_refreshed(exported: Path) -> None:
    policy = policy_of(exported)
    reference = Reference(policy, every=2)
    assert set(reference.weights[0]) == set(weights(policy.model.module)) - frozen(policy.model.module)
    minibatch = [from_rows(TOKENS[:, :-1], TOKENS[:, 1:], 64)]
    start = policy.logprobs(minibatch)[0]
    train(policy, 0, 2)
    moved = policy.logprobs(minibatch)[0]
    assert not torch.allclose(moved, start)
    assert torch.equal(reference.logprobs([minibatch])[0][0], start)
    assert reference.refresh(2)
    assert torch.equal(reference.logprobs([minibatch])[0][0], moved)


def test_bfloat16_trains(exported: Path) -> None:
    policy = policy_of(exported, dtype="bfloat16")
    train(policy, 0, 2)
    assert all(adapter.b.dtype is torch.bfloat16 for adapter in adapters(policy.model.module).values())
    assert any(adapter.b.abs().max() > 0 for adapter in adapters(policy.model.module).values())


def test_targets_choose_the_layers(exported: Path) -> None:
    default = adapters(build(exported, LoraSection()).module)
    assert len(default) == 3 * 5 + 2 * 3  # five of attention in each layer; one dense MLP, two shared experts
    assert not [name for name in default if ".experts." in name or "router" in name]
    assert set(adapters(build(exported, LoraSection(targets=["mlp"])).module)) == {
        name for name in default if ".mlp." in name
    }


def test_a_target_that_the_model_does_not_have_is_refused(model_folder) -> None:  # type: ignore[no-untyped-def]
    dense = model_folder(first_k_dense_replace=3, num_nextn_predict_layers=0)
    with pytest.raises(ConfigError, match="'experts', but the model has no linear layers of that kind"):
        build(dense, load_weights=False)


def test_a_scalar_head_is_trained_whole(exported: Path) -> None:
    initialize(ParallelSection(), seed=3)
    model = build_model(section(exported, load_weights=True, mtp_loss_coef=0.0, lora=LoraSection()), 64, head="scalar")
    free = [name for name, param in model.module.named_parameters() if param.requires_grad and ".lora." not in name]
    assert free == ["output_layer.weight"]


def test_size_says_what_is_trained() -> None:
    """A 1024 x 512 matrix with an adapter of rank 2: 2 x (1024 + 512) are trained, 524,288 x (4 + 8) bytes saved."""
    assert size(ParameterCounts(total=524_288, trained=524_288), torch.float32) == "524,288 parameters"
    expected = "3,072 of 527,360 parameters are trained (0.58%), which saves 6.0 MiB of gradients and optimizer state"
    assert size(ParameterCounts(total=527_360, trained=3_072), torch.float32).startswith(expected)


def test_dropout_is_for_training_only() -> None:
    torch.manual_seed(0)
    adapter = Adapter(torch.zeros(8, 1000), LoraSection(rank=8, alpha=8.0, dropout=0.5))
    torch.nn.init.eye_(adapter.b)
    with torch.no_grad():
        adapter.a.fill_(1e-3)
    x = torch.ones(1, 1000)
    torch.testing.assert_close(adapter.eval()(x), torch.ones(1, 8))
    kept = adapter.train()(x)
    assert not torch.equal(kept, torch.ones(1, 8))
    torch.testing.assert_close(kept, torch.ones(1, 8), atol=0.2, rtol=0)


def test_a_checkpoint_holds_what_is_trained_and_not_the_base(exported: Path, tmp_path: Path) -> None:
    policy, checkpoints = policy_of(exported), Checkpoints(tmp_path, CheckpointSection(), {"seed": 0})
    reference = Reference(policy, every=2)
    train(policy, 0, 2)
    assert reference.refresh(2)
    train(policy, 2, 1)
    checkpoints.save(3, policy.trainable, {"reference": reference.weights}, {})
    named = load_plain_metadata(tmp_path / "step_00000003")
    assert any(".lora." in name for name in named)
    assert not [name for name in named if "linear" in name and ".lora." not in name]
    with pytest.raises(DataError, match=r"step_00000003 holds LoRA adapters only: .* into the folder hf of its output"):
        TorchDistReader(tmp_path / "step_00000003")

    resumed = policy_of(exported)
    restored = Reference(resumed, every=2)
    checkpoints.load(3, resumed.trainable, {"reference": restored.weights})
    [kept], [back] = reference.weights, restored.weights
    assert [name for name, tensor in kept.items() if not torch.equal(tensor, back[name])] == []
    ours, theirs = weights(resumed.model.module), weights(policy.model.module)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def load_plain_metadata(folder: Path) -> list[str]:
    """Names of the tensors in a checkpoint."""
    return list(dist_checkpointing.load_tensors_metadata(str(folder)))
