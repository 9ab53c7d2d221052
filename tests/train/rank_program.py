"""One PPO step without an engine, in as many processes as started it; the first writes what it saw.

``python -m tests.train.rank_program MODEL_FOLDER OUTPUT.json``, with torch's RANK and WORLD_SIZE for several.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist

from megatron_r1.advantage.gae import Gae
from megatron_r1.config.load import validate
from megatron_r1.config.runs import RLConfig
from megatron_r1.loss.ppo import Ppo
from megatron_r1.train.critic import Critic  # prepares megatron for the CPU with the first import of its package
from megatron_r1.train.learner import Learner
from megatron_r1.train.policy import Policy
from megatron_r1.train.reference import Reference
from megatron_r1.types import Group, Question, Sample

SUM = {"type": "reasoning_gym", "dataset": "chain_sum"}


def config(model: Path, output: Path, **changes: Any) -> RLConfig:
    tree: dict[str, Any] = {
        "output": str(output),
        "steps": 4,
        "questions": 4,
        "group_size": 3,
        "minibatches": 2,
        "tokens_per_microbatch": 60,
        "model": {"path": str(model), "load_weights": False, "dtype": "float32", "init_std": 0.08},
        "data": {"task": SUM},
        "heldout": {"task": SUM},
        "rewards": {"accuracy": {"type": "task"}},
        "advantage": {"type": "gae", "lam": 0.9, "kl_coef": 0.1},
        "loss": {"type": "ppo", "kl_coef": 0.1},
        "critic": {"optim": {"lr": 1e-2, "weight_decay": 0.0}, "value_clip": 0.5, "epochs": 2},
        "rollout": {"max_model_len": 128, "max_tokens": 32},
        "optim": {"lr": 1e-2, "weight_decay": 0.0},
    }
    return validate(RLConfig, tree | changes, where="test")


def groups() -> list[Group]:
    """Random responses of unequal length; a reward that depends on the first token."""
    rng = random.Random(0)

    def sample() -> Sample:
        tokens = [rng.randrange(400) for _ in range(rng.randint(1, 20))]
        return Sample(tokens, [-6.0] * len(tokens), "", True, 0, reward=tokens[0] / 200)

    question = Question("q", "task", "?", "!")
    return [Group(question, [rng.randrange(400) for _ in range(5)], [sample() for _ in range(3)]) for _ in range(4)]


def learner(config: RLConfig) -> Learner:
    from megatron_r1.model.build import build_model
    from megatron_r1.model.parallel import initialize

    initialize(config.parallel, config.seed)
    assert config.critic is not None
    policy = Policy(build_model(config.model, 128), config.optim, 8)
    return Learner(
        config=config,
        tokenizer=cast(Any, None),
        policy=policy,
        reference=Reference(policy, 100),
        critic=Critic(config, config.critic),
        rollouts=cast(Any, None),
        heldout=[],
        advantage=Gae(Gae.Config(lam=0.9, kl_coef=0.1)),
        loss=Ppo(Ppo.Config(kl_coef=0.1)),
    )


def steps(trained: Learner, first: int, end: int) -> list[dict[str, Any]]:
    """What is seen in each step: figures, and what the samples hold."""
    seen = []
    for step in range(first, end):
        rollout = groups()
        batch, figures = trained.score(rollout, step)
        batch, estimated = trained.estimate(rollout, batch, step)
        samples = [sample for group in rollout for sample in group.samples]
        assert trained.critic is not None
        updates = [trained.critic.step(batch), *(trained.policy.step(part, trained.loss) for part in batch)]
        held = [[sample.trainer_logprobs, sample.values, sample.advantages] for sample in samples]
        seen.append({"figures": figures | estimated, "samples": held, "updates": updates})
    return seen


def main() -> None:
    model, output = map(Path, sys.argv[1:])
    seen = steps(learner(config(model, output.parent)), 0, 2)
    if dist.get_rank() == 0:
        output.write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
