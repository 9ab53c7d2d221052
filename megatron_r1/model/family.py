"""What a model family must say: how its Hugging Face config becomes Megatron's, and which tensor is which."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1.config.sections import ModelSection
from megatron_r1.errors import DataError

HFConfig = dict[str, Any]
"""The contents of a Hugging Face `config.json`."""


@dataclass(frozen=True)
class Rule:
    """One Megatron tensor and the Hugging Face tensors that hold it.

    The same rules serve import, export and live weight sync.
    """

    megatron: str
    hf: tuple[str, ...]
    """The Hugging Face tensors that stand one under another in the Megatron tensor (dimension 0)."""
    copies: tuple[str, ...] = ()
    """Further Hugging Face names under which the same tensor is stored again."""
    float32: bool = False
    """Kept in float32 whatever the model's dtype."""


class Family(Protocol):
    """One file in `families/` implements this for one or more Hugging Face architectures."""

    @staticmethod
    def transformer_config(hf: HFConfig, section: ModelSection) -> TransformerConfig:
        """Megatron's config of the model that `hf` describes."""
        ...

    @staticmethod
    def rules(hf: HFConfig) -> Iterator[Rule]:
        """Every tensor of the model, the MTP layers' included."""
        ...


def require(hf: HFConfig, key: str, *allowed: Any) -> Any:
    """`hf[key]`, checked.

    Raises:
        DataError: the key is missing, or its value is not one of `allowed` (when any are given).
    """
    if key not in hf:
        raise DataError(f"config.json has no {key!r}, which {hf.get('architectures')} needs")
    if allowed and hf[key] not in allowed:
        choices = " or ".join(repr(value) for value in allowed)
        raise DataError(f"config.json: {key} = {hf[key]!r} is not supported, only {choices}")
    return hf[key]
