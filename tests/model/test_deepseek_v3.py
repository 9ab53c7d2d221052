"""The model against transformers' DeepseekV3ForCausalLM, and its MTP loss against the formula worked by hand."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer

from megatron_r1.compat.megatron_specs import mtp_means
from megatron_r1.model.build import BuiltModel
from megatron_r1.model.mapping import weights

ROWS, LENGTH = 2, 64


@pytest.fixture(scope="module")
def reference(exported: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokens(built: BuiltModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(built.hf["vocab_size"], (ROWS, LENGTH + 1), generator=generator)


def cross_entropy(built: BuiltModel, tokens: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(LENGTH).expand(ROWS, -1)
    return built.module(tokens[:, :-1], positions, None, labels=tokens[:, 1:])


def main_loss(built: BuiltModel, tokens: torch.Tensor) -> torch.Tensor:
    return cross_entropy(built, tokens).mean()


def test_logits_equal_transformers(built: BuiltModel, reference: torch.nn.Module, tokens: torch.Tensor) -> None:
    logits = []
    # Cloned, because Megatron's cross-entropy works in place.
    handle = built.module.output_layer.register_forward_hook(
        lambda module, args, output: logits.append(output[0].clone())
    )
    with torch.no_grad():
        cross_entropy(built, tokens)
        expected = reference(tokens[:, :-1]).logits
    handle.remove()
    main = logits[-1].transpose(0, 1)  # the main head comes after the MTP head
    assert expected.std() > 0.3, "logits too flat to tell models apart"
    torch.testing.assert_close(main, expected, atol=1e-4, rtol=0)


def test_yarn_is_in_force(built: BuiltModel, model_folder, tokens: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    from megatron_r1.model.build import build_model
    from tests.model.conftest import section

    plain = build_model(section(model_folder(rope_scaling=None), balance_loss_coef=0.0), 128)
    plain.module.load_state_dict(built.module.state_dict())
    with torch.no_grad():
        difference = (cross_entropy(plain, tokens) - cross_entropy(built, tokens)).abs().max()
    assert difference > 1e-3


def test_gradients_equal_transformers(built: BuiltModel, reference: torch.nn.Module, tokens: torch.Tensor) -> None:
    config = built.module.config
    built.module.zero_grad()
    config.mtp_loss_scaling_factor, kept = 0.0, config.mtp_loss_scaling_factor
    main_loss(built, tokens).backward()
    config.mtp_loss_scaling_factor = kept
    reference.zero_grad()
    logits = reference(tokens[:, :-1]).logits
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()

    theirs = {name: parameter.grad for name, parameter in reference.named_parameters()}
    layers = built.hf["num_hidden_layers"]
    compared = 0
    ours = dict(built.module.named_parameters())
    for rule in built.map.rules:
        gradient = ours[rule.megatron].grad if rule.megatron in ours else None
        if f"model.layers.{layers}." in rule.hf[0] or gradient is None:
            continue
        for name, part in zip(rule.hf, gradient.chunk(len(rule.hf)), strict=True):
            expected = _gradient(theirs, name)
            assert (part - expected).norm() <= 1e-3 * expected.norm(), name
            compared += 1
    assert compared == sum(len(rule.hf) for rule in built.map.rules if rule.megatron in ours) - sum(
        len(rule.hf) for rule in built.map.rules if rule.megatron in ours and rule.megatron.startswith("mtp.")
    )


def _gradient(theirs: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """transformers keeps all experts of a layer in one stack: gate and up rows together, then down."""
    if ".experts." not in name:
        return theirs[name]
    prefix, _, rest = name.partition(".experts.")
    expert, kind, _ = rest.split(".")
    if kind == "down_proj":
        return theirs[f"{prefix}.experts.down_proj"][int(expert)]
    gate, up = theirs[f"{prefix}.experts.gate_up_proj"][int(expert)].chunk(2)
    return gate if kind == "gate_proj" else up


def test_mtp_loss_equals_the_formula(
    built: BuiltModel, reference: torch.nn.Module, exported: Path, tokens: torch.Tensor
) -> None:
    """DeepSeek-V3 eq. 21-25 written out, with transformers' decoder layer as the block."""
    built.module.train()
    MTPLossLoggingHelper.tracker.clear()
    cross_entropy(built, tokens)
    measured = mtp_means(MTPLossLoggingHelper.tracker)[0].item()
    MTPLossLoggingHelper.tracker.clear()

    stored = load_file(exported / "model.safetensors")
    prefix = f"model.layers.{built.hf['num_hidden_layers']}."
    mtp = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
    block = DeepseekV3DecoderLayer(reference.config, layer_idx=built.hf["num_hidden_layers"] - 1)
    block.load_state_dict(_stacked(mtp, block))
    eps = built.hf["rms_norm_eps"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * mtp[name]

    with torch.no_grad():
        inputs = tokens[:, :-1]
        hidden = reference.model(inputs).last_hidden_state
        following = torch.cat([inputs[:, 1:], torch.zeros(ROWS, 1, dtype=torch.long)], 1)
        embedding = mtp["embed_tokens.weight"][following]
        joined = torch.cat([norm(embedding, "enorm.weight"), norm(hidden, "hnorm.weight")], -1)
        x = joined @ mtp["eh_proj.weight"].T
        rotary = reference.model.rotary_emb(x, torch.arange(LENGTH)[None])
        causal = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)[None, None]
        x = block(x, attention_mask=causal, position_embeddings=rotary)
        x = x[0] if isinstance(x, tuple) else x
        logits = norm(x, "shared_head.norm.weight") @ mtp["shared_head.head.weight"].T
        # Position i predicts t_{i+2}; the last position has no such token.
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 2:].flatten())
    assert measured == pytest.approx(expected.item(), abs=1e-5)
    assert abs(expected.item() - torch.tensor(float(built.hf["vocab_size"])).log().item()) < 1.0


def _stacked(mtp: dict[str, torch.Tensor], block: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The checkpoint's layer in transformers' layout (experts stacked)."""
    own = set(block.state_dict())
    state = {name: value for name, value in mtp.items() if name in own}
    experts = range(sum(name.startswith("mlp.experts.") and name.endswith("down_proj.weight") for name in mtp))
    part = "mlp.experts.{}.{}_proj.weight".format
    state["mlp.experts.gate_up_proj"] = torch.stack(
        [torch.cat([mtp[part(e, "gate")], mtp[part(e, "up")]]) for e in experts]
    )
    state["mlp.experts.down_proj"] = torch.stack([mtp[part(e, "down")] for e in experts])
    return state


def test_selection_bias_moves_towards_balance(built: BuiltModel, tokens: torch.Tensor) -> None:
    """DeepSeek-V3 2.1.2: minus gamma where overloaded, plus gamma where underloaded, nothing else changes."""
    from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias

    router = built.module.decoder.layers[1].mlp.router
    before = router.expert_bias.clone()
    state = {name: value.clone() for name, value in weights(built.module).items()}
    for name, buffer in built.module.named_buffers():
        if name.endswith("local_tokens_per_expert"):
            buffer.zero_()
    main_loss(built, tokens)
    counts = router.local_tokens_per_expert.clone()
    assert counts.sum() == ROWS * LENGTH * built.hf["num_experts_per_tok"]
    _update_router_expert_bias([built.module], built.module.config)
    gamma = built.module.config.moe_router_bias_update_rate
    expected = before + gamma * torch.sign(counts.mean() - counts)
    torch.testing.assert_close(router.expert_bias, expected, atol=1e-7, rtol=0)
    built.module.load_state_dict(state, strict=False)
