"""One pass over the tensors of a push, and what they are before any of them is there."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from megatron_r1.model.safetensors_file import Spec


@dataclass
class NamedTensors:
    """What is sent; can be iterated once.

    Args:
        tensors: Hugging Face names and whole values.
        specs: the same names, in the same order.
    """

    tensors: Iterable[tuple[str, torch.Tensor]]
    specs: Mapping[str, Spec]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.tensors)

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        return sum(spec.nbytes for spec in self.specs.values())

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> "NamedTensors":
        """Tensors that are there already."""
        return cls(tensors.items(), {name: Spec(one.dtype, tuple(one.shape)) for name, one in tensors.items()})
