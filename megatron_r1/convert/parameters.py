"""How many parameters a model has, and how many of them a token meets."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_r1.model.family import HFConfig

_EXPERT = re.compile(r"(.*\.experts\.)local_experts\.(\d+)\.")
_MTP = "mtp."
_SELECTION_BIAS = ".expert_bias"


@dataclass(frozen=True)
class Parameters:
    """Numbers of a model, each tensor once however often it is stored."""

    main: int
    """Embedding and head included, multi-token prediction not."""
    activated: int
    """Of `main`, those that take part in a token's computation: the routed experts' share that it is sent to; without
    the bias that only helps to choose them (DeepSeek-V3 2.1.2)."""
    mtp: int
    """Of the multi-token-prediction layers."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.main + self.mtp


def count(sizes: Mapping[str, int], hf: HFConfig) -> Parameters:
    """Count by Megatron's names, which are the same in every family.

    Args:
        sizes: Megatron tensor -> its number of elements.
        hf: `config.json`.
    """
    main = {name: size for name, size in sizes.items() if not name.startswith(_MTP)}
    activated = 0
    experts: defaultdict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))  # of a layer, by number
    for name, size in main.items():
        if found := _EXPERT.match(name):
            experts[found[1]][found[2]] += size
        elif not name.endswith(_SELECTION_BIAS):
            activated += size
    for layer in experts.values():
        activated += sum(layer.values()) * hf.get("num_experts_per_tok", len(layer)) // len(layer)
    return Parameters(sum(main.values()), activated, sum(sizes.values()) - sum(main.values()))
