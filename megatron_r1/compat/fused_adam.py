"""A correction of megatron-core where Transformer Engine's FusedAdam keeps its state in lower precision."""

from typing import Any

import torch


def let_megatron_make_its_state(kind: type[Any]) -> None:
    """Give `FusedAdam.initialize_state` the default for an argument that Megatron leaves out.

    Upstream (0.16.1, optimizer/__init__.py:399; 0.19.2, :596) calls it with the parameter alone, which is a TypeError.
    Transformer Engine's own `step` keeps the 16 bits that a bfloat16 weight lacks of its float32 copy where it was told
    to, and so does this. Can go when upstream passes the argument.

    Args:
        kind: the class.
    """
    original = kind.initialize_state
    if getattr(original, "has_default", False):
        return

    def initialize_state(self: Any, param: Any, store_param_remainders: bool | None = None) -> None:
        if store_param_remainders is None:
            store_param_remainders = self.store_param_remainders and param.dtype == torch.bfloat16
        original(self, param, store_param_remainders)

    vars(initialize_state)["has_default"] = True
    kind.initialize_state = initialize_state
