"""Experts that a real vLLM server has recorded, beside transformers'; and a learner in bfloat16 that uses them."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DeepseekV3ForCausalLM

from megatron_r1.config.asynchrony import AheadSection
from megatron_r1.config.sections import OptimSection, ParallelSection, PolicySection
from megatron_r1.errors import EngineError
from megatron_r1.loss.grpo import Grpo
from megatron_r1.model.build import build_model
from megatron_r1.model.parallel import initialize
from megatron_r1.rollout.fleet import Fleet
from megatron_r1.rollout.responses import Response, joined
from megatron_r1.rollout.routed_experts import decode as decode_experts
from megatron_r1.rollout.routed_experts import encode
from megatron_r1.train.batch import Share, split, trajectories, with_inputs
from megatron_r1.train.mismatch import logprob_difference
from megatron_r1.train.policy import Policy
from megatron_r1.train.routing_replay import refuse_unrecorded, without_replay
from megatron_r1.types import Group, Question, Sample
from tests.rollout.test_fleet import make_prompts
from tests.rollout.tiny_model import decode, free_port, rollout_section

pytestmark = pytest.mark.timeout(900)  # the start of a server, on a busy machine


@pytest.fixture(scope="module")
def section() -> AheadSection:
    plain = rollout_section(free_port(), start_timeout=600.0).model_dump(exclude_unset=True)
    return AheadSection.model_validate(plain | {"routing_replay": True})


@pytest.fixture(scope="module")
def folders(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The models, with groups as Megatron can choose them."""
    found = []
    for model in models:
        folder = tmp_path_factory.mktemp("trainable") / model.name
        shutil.copytree(model, folder)
        config = json.loads((model / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"topk_group": config["num_experts_per_tok"] // 2}))
        found.append(folder)
    return found[0], found[1]


@pytest.fixture(scope="module")
def fleet(
    folders: tuple[Path, Path], section: AheadSection, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    with Fleet(section, folders[0], tmp_path_factory.mktemp("recording"), "float32", decode) as running:
        yield running


def chosen(model: DeepseekV3ForCausalLM, tokens: list[int]) -> np.ndarray:
    """What transformers' routers choose, in no order; zeros at dense layers. [tokens, layers, experts a token]"""
    found: dict[int, torch.Tensor] = {}
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _, __, output, n=number: found.update({n: output[2]}))
        for number, layer in enumerate(model.model.layers)
        if hasattr(layer.mlp, "gate")
    ]
    with torch.no_grad():
        model(torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    some = next(iter(found.values()))
    layers = [found.get(number, torch.zeros_like(some)) for number in range(len(model.model.layers))]
    return torch.stack(layers, 1).numpy()


def differing(folder: Path, prompts: list[list[int]], groups: list[list[Sample]]) -> float:
    """Share of recorded choices, of one token in one layer, that are not those of transformers."""
    model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    same = []
    for prompt, group in zip(prompts, groups, strict=True):
        for sample in group:
            expected, found = chosen(model, prompt + sample.tokens[:-1]), sample.routed_experts
            assert found is not None
            assert found.shape == expected.shape
            assert found.dtype == np.uint8
            same.append((np.sort(found, -1) == np.sort(expected, -1)).all(-1)[:, 1:].ravel())
    return float(1 - np.concatenate(same).mean())


def test_recorded_are_the_experts_of_every_token(fleet: Fleet, folders: tuple[Path, Path]) -> None:
    """Of the prompt, too, also where samples share its beginning in the prefix cache; and after new weights."""
    prompts = make_prompts(6, seed=0)
    groups = fleet.sample(prompts, n=4, seed=3)
    assert differing(folders[0], prompts, groups) < 1e-3  # but for ties within rounding
    assert differing(folders[1], prompts, groups) > 0.3
    fleet.update_weights(folders[1] / "model.safetensors", version=1)
    try:
        assert differing(folders[1], prompts, fleet.sample(prompts, n=4, seed=3)) < 1e-3
    finally:
        fleet.update_weights(folders[0] / "model.safetensors", version=2)


def test_a_learner_in_other_numbers_is_nearer_with_replay(fleet: Fleet, folders: tuple[Path, Path]) -> None:
    """The engine computes in float32, the learner in bfloat16: some tokens go to other experts, and cost the most."""
    prompts = make_prompts(16, seed=1)
    answers = fleet.sample(prompts, n=4, seed=5)
    question = Question("q", "task", "?", "!")
    groups = [Group(question, prompt, samples) for prompt, samples in zip(prompts, answers, strict=True)]
    initialize(ParallelSection(), seed=0)
    policy = Policy(build_model(PolicySection(path=folders[0]), 128), OptimSection(lr=1e-3), updates=1)
    refuse_unrecorded(groups, policy.model)
    share = Share(0, 1, 4096, torch.device("cpu"))
    [minibatch] = split(trajectories(groups), 1, 0, Grpo(Grpo.Config()), share)
    after = logprob_difference([with_inputs(minibatch, old_logprobs=policy.logprobs(minibatch))])
    before = without_replay(policy, minibatch, logprob_difference)
    assert before["rerouted_choices"] > 0.005
    assert before["rerouted_tokens"] > before["rerouted_choices"]
    assert after["logprob_difference_mean"] < 0.8 * before["own_routing_difference_mean"]
    assert after["logprob_difference_max"] < before["own_routing_difference_max"]


def test_over_new_weights_each_token_has_the_experts_of_its_first_pass(
    fleet: Fleet, folders: tuple[Path, Path]
) -> None:
    """An engine computes anew what it has of a response when weights change, but has given those rows already."""
    prompts, mixed = make_prompts(48, seed=7), []
    fleet.feed("continuous")
    old, new = folders
    for version in range(10, 60):  # until the change has come in the middle of a response
        stream = fleet.stream(prompts, n=4, seed=version)
        answers = dict([next(stream)])
        fleet.update_weights(new / "model.safetensors", version)
        answers |= dict(stream)
        mixed = [(prompts[i], one) for i, group in answers.items() for one in group if len(one.weight_spans) == 2]
        if mixed:
            break
        old, new = new, old
    fleet.feed("batch")
    assert mixed
    models = [DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (old, new)]
    same = []
    for prompt, sample in mixed[:16]:
        before, after = (chosen(model, prompt + sample.tokens[:-1]) for model in models)
        border = len(prompt) + sample.weight_spans[0][1] - 1  # the last token of old weights is fed to the new ones
        expected, found = np.concatenate([before[:border], after[border:]]), sample.routed_experts
        assert found is not None
        same.append((np.sort(found, -1) == np.sort(expected, -1)).all(-1)[:, 1:].ravel())
    assert 1 - np.concatenate(same).mean() < 1e-2


def test_an_engine_that_does_not_record_is_not_trained_with(
    fleets: tuple[Fleet, Fleet], section: AheadSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleets[0], "section", section)
    with pytest.raises(EngineError, match="start this one with --enable-return-routed-experts"):
        fleets[0].sample(make_prompts(2, seed=2), n=1, seed=0)


@pytest.mark.parametrize(("dtype", "kept"), [(np.uint8, np.uint8), (np.uint16, np.int16)])
def test_what_is_sent_arrives(dtype: type[np.integer], kept: type[np.integer]) -> None:
    experts = np.random.default_rng(0).integers(0, np.iinfo(dtype).max // 2, (5, 3, 4)).astype(dtype)
    again = decode_experts(encode(experts))
    assert again.dtype == kept
    assert np.array_equal(again, experts)
    for text in ("", "?", encode(experts)[:40], encode(experts[0]), encode(experts.astype(np.float32))):
        with pytest.raises(ValueError, match=r"."):
            decode_experts(text)


def test_a_response_in_two_parts_keeps_the_experts_of_each_first_pass() -> None:
    """The second part is asked for with the first as its prompt, so that the engine says those again."""

    def part(tokens: list[int], experts: int, length: int, reason: str) -> Response:
        array = np.full((length, 3, 2), experts, dtype=np.uint8)
        said = {"tokens": tokens, "logprobs": [-1.0] * len(tokens), "finish_reason": reason}
        return Response(prompt=0, sample=0, weight_versions=[experts], **said).model_copy(
            update={"routed_experts": array}
        )

    begun, rest = (
        part([7, 8, 9], 4, length=2 + 3 - 1, reason="abort"),
        part([10, 2], 5, length=5 + 2 - 1, reason="stop"),
    )
    whole = joined(begun, rest)
    assert whole.routed_experts is not None
    assert whole.routed_experts[:, 0, 0].tolist() == [4] * 4 + [5] * 2
    assert len(whole.routed_experts) == 2 + len(whole.tokens) - 1
