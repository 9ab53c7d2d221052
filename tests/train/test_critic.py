"""The critic: it learns what responses earn, sees no future, and comes back bit for bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_r1.advantage.group_relative import GroupRelative
from megatron_r1.config.load import validate
from megatron_r1.errors import DataError
from megatron_r1.loss.ppo import Ppo
from megatron_r1.model.mapping import weights
from megatron_r1.report.samples import shown
from megatron_r1.train.critic import Critic, explained_variance
from megatron_r1.train.learner import Learner
from megatron_r1.train.memory import state_bytes
from megatron_r1.types import Question, Sample
from tests.train.rank_program import config, groups, learner, steps


@pytest.fixture
def make_learner(make_model: Callable[[], Any], tmp_path: Path) -> Callable[..., Learner]:
    """The same policy, reference and critic at every call."""
    make_model()  # writes config.json

    def make(**changes: Any) -> Learner:
        return learner(config(tmp_path, tmp_path / "run", **changes))

    return make


def critic_of(made: Learner) -> Critic:
    assert made.critic is not None
    return made.critic


def test_it_learns_what_responses_earn(make_learner: Callable[..., Learner]) -> None:
    """The reward depends on the first token of a response, so all but the first value can be right."""
    seen = steps(make_learner(), 0, 12)
    before, after = (seen[at]["figures"]["explained_variance"] for at in (0, -1))
    assert before < 0.1
    assert after > 0.5
    assert seen[-1]["updates"][0]["value_loss"] < 0.3 * seen[0]["updates"][0]["value_loss"]
    assert {"critic_grad_norm", "critic_lr"} <= seen[0]["updates"][0].keys()


def test_the_value_of_a_token_does_not_see_it(make_learner: Callable[..., Learner]) -> None:
    """Two responses that differ in the third token alone have the same values before it, and other ones after."""
    made, rollout = make_learner(), groups()
    samples = [sample for group in rollout for sample in group.samples]
    one = next(sample for sample in samples if len(sample.tokens) > 5)
    batch, _ = made.score(rollout, 0)
    made.estimate(rollout, batch, 0)
    first = one.values
    one.tokens[2] = (one.tokens[2] + 1) % 400
    batch, _ = made.score(rollout, 0)
    made.estimate(rollout, batch, 0)
    assert first is not None
    assert one.values is not None
    assert one.values[:3] == pytest.approx(first[:3], abs=1e-6)
    assert abs(one.values[3] - first[3]) > 1e-4


def test_of_several_ranks_the_group_comes_that_the_report_shows(make_learner: Callable[..., Learner]) -> None:
    """The others' log-probabilities stay where they are, unless the estimator needs them."""
    made, rollout = make_learner(), groups()
    for number, group in enumerate(rollout):
        group.question = Question(f"{'ab'[number // 3]}-{number}", "task", "?", "!")
    batch, _ = made.score(rollout, 0)
    made.advantage, made.critic, made.policy.ranks = GroupRelative(GroupRelative.Config()), None, 2
    for step in (0, 1):
        made.estimate(rollout, batch, step)
        held = [[sample.trainer_logprobs is not None for sample in group.samples] for group in rollout]
        assert [number for number, group in enumerate(held) if any(group)] == [shown(rollout, step)]
        assert all(held[shown(rollout, step)])
        for group in rollout:
            group.samples = [replace(sample, trainer_logprobs=None) for sample in group.samples]
    assert {shown(rollout, step) for step in (0, 1)} == {0, 3}


@pytest.mark.parametrize("loss", [{"aggregate": "sequence"}, {"aggregate": "constant", "max_tokens": 500}])
def test_every_token_counts_alike_whatever_the_policys_loss_says(
    make_learner: Callable[..., Learner], loss: dict[str, Any]
) -> None:
    """The first value loss of a minibatch is 1/2 the mean of (V - R)^2 over its tokens."""
    made = make_learner(critic={"optim": {"lr": 1e-9}, "value_clip": 0.0})
    made.loss = Ppo(validate(Ppo.Config, {"kl_coef": 0.1} | loss, where="test"))
    batch, _ = made.estimate(rollout := groups(), made.score(rollout, 0)[0], 0)
    means = []
    for minibatch in batch:
        pairs = [(micro.inputs.old_values, micro.inputs.returns) for micro in minibatch]
        errors = torch.cat([(v - r) ** 2 for v, r in pairs if v is not None and r is not None])
        means.append(float(errors.mean()) / 2)
    assert critic_of(made).step(batch)["value_loss"] == pytest.approx(sum(means) / len(means), rel=1e-4)


def test_it_comes_back_bit_for_bit(make_learner: Callable[..., Learner]) -> None:
    made = make_learner()
    steps(made, 0, 2)
    critic_of(made).save(2)
    resumed = make_learner(seed=1).critic
    other = make_learner()
    critic_of(other).load(2)
    assert resumed is not None
    ours, theirs = weights(critic_of(made).scorer.model.module), weights(critic_of(other).scorer.model.module)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not all(torch.equal(tensor, weights(resumed.scorer.model.module)[name]) for name, tensor in ours.items())
    with pytest.raises(DataError, match="step_00000003"):
        critic_of(other).load(3)


def test_a_checkpoint_may_come_before_the_first_update(make_learner: Callable[..., Learner]) -> None:
    """Those of the policy do, while the critic warms up."""
    made = make_learner()
    critic_of(made).save(1)
    critic_of(make_learner()).load(1)


def test_it_warms_up_for_its_steps(make_learner: Callable[..., Learner]) -> None:
    critic = critic_of(make_learner(critic={"optim": {"lr": 1e-2}, "warmup": 2}))
    assert [critic.warming(step) for step in range(4)] == [True, True, False, False]


def test_state_is_counted_as_it_is_made(make_learner: Callable[..., Learner]) -> None:
    """float32: weight, gradient and two moments of 4 bytes each; no vocabulary's layer, but one row."""
    made = make_learner()
    policy, critic = made.policy.trainable, critic_of(made).scorer.trainable
    count = sum(parameter.numel() for parameter in critic.chunks[0].parameters())
    assert state_bytes(critic) == pytest.approx(16 * count, rel=1e-3)  # buffers are padded
    hidden = critic.chunks[0].config.hidden_size
    rows = sum(p.numel() for p in policy.chunks[0].parameters()) - count
    assert rows == (400 - 1) * hidden


def test_explained_variance_by_hand() -> None:
    """Returns 0, 1, 2 (variance 2/3); values 0, 1, 1: errors 0, 0, 1 of variance 2/9, so 1 - 1/3."""

    def sample(values: list[float]) -> Sample:
        return Sample([1] * len(values), [0.0] * len(values), "", True, 0, values=values)

    assert explained_variance([sample([0.0, 1.0]), sample([1.0])], [[0.0, 1.0], [2.0]]) == pytest.approx(2 / 3)
    assert explained_variance([sample([0.3, 0.3])], [[1.0, 1.0]]) == 0.0
