"""TRL's GRPOTrainer doing the work of `grpo_vs_trl.py`, which starts this program: WORK ADDRESS SETTINGS.

WORK and SETTINGS, the arguments of `GRPOConfig`, are JSON.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from grpo_work import Turn, Work, letter_share, prompts
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.extras.profiling import ProfilingContext


def main() -> None:
    work, address, settings = Work(**json.loads(sys.argv[1])), sys.argv[2], json.loads(sys.argv[3])
    torch.set_num_threads(work.threads)
    clock = Clock()

    def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        clock.spent["tokens"] += sum(map(len, completion_ids))
        return [letter_share(text) for text in completions]

    tokenizer = AutoTokenizer.from_pretrained(work.model, padding_side="left")
    rows = [{"prompt": row["text"]} for row in prompts(Path(work.prompts))]
    GRPOTrainer(
        model=work.model,
        reward_funcs=reward,
        args=GRPOConfig(**settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[TakesTurns(Turn(address), clock, work.updates)],
    ).train()


class Clock:
    """TRL's own profiling contexts, which otherwise report to wandb alone."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        """Seconds by name, and `tokens` of answers."""

        def note(context: ProfilingContext, seconds: float) -> None:
            self.spent[context.name.partition(".")[2]] += seconds

        ProfilingContext._log_metrics = note

    def phases(self) -> dict[str, float]:
        """Seconds of the step since the last call; what is not in them is the update."""
        spent, self.spent = self.spent, defaultdict(float)
        rollout = sum(seconds for name, seconds in spent.items() if "generate" in name)
        prepared = rollout + spent["sync_weights"] + spent["_calculate_rewards"]
        return {
            "tokens": spent["tokens"],
            "rollout": rollout,
            "sync": spent["sync_weights"],
            "reward": spent["_calculate_rewards"],
            "logprobs": max(spent["_prepare_inputs"] - prepared, 0.0),
        }


class TakesTurns(TrainerCallback):
    """Waits for its turn before the first update of each step."""

    def __init__(self, turn: Turn, clock: Clock, updates: int) -> None:
        self._turn, self._clock, self._updates = turn, clock, updates

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self._updates == 0:
            self._turn.wait(self._clock.phases())


if __name__ == "__main__":
    main()
