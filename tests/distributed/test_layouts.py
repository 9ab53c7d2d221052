"""Every layout gives the numbers of one process: figures, log-probabilities, and all weights after the steps."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.kinds import STEPS
from tests.distributed.layouts import (
    BOUND,
    LAYOUTS,
    PARTS,
    ROUTER_BIAS,
    Launcher,
    Seen,
    differences,
    parts,
    relative,
    worst,
)

OVERLAPPED = {"dp4": {"section": {"kernels": {"overlap_gradient_reduction": True}}}}
"""Gradients are summed while the backward pass goes on, as with Transformer Engine's layers; not so in `dp2`."""
PIPELINES = ["pp2", "pp4"]
"""Interleaved stages take rows of one length, whose padding changes how sums are cut."""
UNDISTURBED = {"section": {"mtp_loss_coef": 0.0}, "optim": {"clip_grad": 1e9}, "microbatch": 2}
"""The gradient's norm is never summed into the weights, and no matrix gets gradients from two stages."""
_HEADS = ["lm_head", "model.layers.4.shared_head.head"]
_EMBEDDINGS = ["model.embed_tokens", "model.layers.4.embed_tokens"]


def _expert(layer: int) -> list[str]:
    return [f"model.layers.{layer}.mlp.experts.7.{name}_proj" for name in ("gate", "up")]


FEW = {
    "ep4": [*_HEADS, *_expert(4)],
    "pp2_ep2": [*_EMBEDDINGS, *_expert(1), *_HEADS, *_expert(4)],
    "pp4": [*_EMBEDDINGS, "model.layers.1.self_attn.o_proj", *_expert(1),
            "model.layers.2.self_attn.o_proj", *_expert(2), *_HEADS, *_expert(4)],
}  # fmt: skip
"""What each stage's largest tensor and its last expert are in a checkpoint; the MTP layer is number 4 there. A stage of
`pp4` has one layer, and the first has no experts."""

pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_numbers_as_one_process(
    launcher: Launcher, alone: dict[str, Seen], measured: dict[str, dict[str, float]], name: str
) -> None:
    """Weights go out as they came in, byte for byte, in both dtypes; what follows is within the bound.

    A selection bias moves by whole steps, so it is the same number wherever all tokens are counted.
    """
    found = launcher.run(name, LAYOUTS[name], parts(*PARTS, **OVERLAPPED.get(name, {})))
    assert found["pretrain"].seen["start"] == alone["pretrain"].seen["start"]
    assert list(found["pretrain"].seen["start"]["torch.float32"]) == list(
        alone["pretrain"].seen["start"]["torch.float32"]
    )
    if name in FEW:
        assert found["pretrain"].seen["few"] == [f"{each}.weight" for each in FEW[name]]
    measured[name] = worst([differences(found[part], alone[part]) for part in PARTS])
    assert measured[name]["router_bias"] == 0
    assert max(measured[name].values()) < BOUND, measured[name]


def test_adapters_are_merged_into_their_own_layers(launcher: Launcher) -> None:
    """Megatron numbers the layers of a rank's virtual stages alike."""
    found = [launcher.run(f"adapted_{name}", LAYOUTS.get(name, {}), parts("adapted")) for name in ("one", "pp2_vpp2")]
    assert found[0]["adapted"].seen["start"] == found[1]["adapted"].seen["start"]


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_give_the_same_bits(launcher: Launcher, plain: dict[str, Seen], name: str) -> None:
    """Stages add up the same numbers in the same order."""
    found = launcher.run(f"{name}_plain", LAYOUTS[name], parts(*PARTS, **UNDISTURBED))
    for part in PARTS:
        assert found[part].weights.keys() == plain[part].weights.keys()
        differing = [
            key for key, value in plain[part].weights.items() if not torch.equal(value, found[part].weights[key])
        ]
        assert differing == [], part
    for key in ("logprobs", "entropies"):
        assert found["rl"].seen[key] == plain["rl"].seen[key]


@pytest.fixture(scope="module")
def plain(launcher: Launcher) -> dict[str, Seen]:
    return launcher.run("plain", {}, parts(*PARTS, **UNDISTURBED))


def test_one_process_sends_what_the_folder_holds(launcher: Launcher, alone: dict[str, Seen]) -> None:
    stored = load_file(launcher.folder / "models/v3/model.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        sent = alone["pretrain"].seen["start"][str(dtype)]
        for name, tensor in stored.items():
            kept = tensor if name.endswith(ROUTER_BIAS) else tensor.to(dtype)
            assert sent[name] == hashlib.sha256(kept.view(torch.uint8).numpy().tobytes()).hexdigest(), name
        assert {name.split(".")[-2] for name in sent.keys() - stored.keys()} == {"embed_tokens", "head"}  # MTP's copies


@pytest.mark.parametrize("part", PARTS)
def test_the_steps_move_all_weights(launcher: Launcher, alone: dict[str, Seen], part: str) -> None:
    """By far more than the bound; else the comparisons above would say nothing."""
    stored, figures = load_file(launcher.folder / "models/v3/model.safetensors"), alone[part].seen["figures"]
    moved = {name: relative(alone[part].weights[name], tensor) for name, tensor in stored.items()}
    assert min(moved.values()) > 200 * BOUND, min(moved, key=lambda name: moved[name])
    updates = [step for step in figures if "grad_norm" in step]
    assert len(updates) == STEPS
    assert all("mtp_loss" in step for step in updates)
    assert max(step["grad_norm"] for step in updates) > 1, "the clip must bind, so that the norm tells in the weights"
