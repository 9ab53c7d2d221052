"""One pass over the tensors of a push, and what they are before any of them is there."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from megatron_r1.model.safetensors_file import Spec

Tensors = Iterable[tuple[str, torch.Tensor]]


@dataclass
class NamedTensors:
    """What is sent; can be iterated once.

    Args:
        tensors: Hugging Face names and whole values: all, or this rank's share.
        specs: all names, in the order of all.
        source: what `tensors` are made of.
    """

    tensors: Tensors
    specs: Mapping[str, Spec]
    source: Iterator[object] | None = None

    def __post_init__(self) -> None:
        if self.source is None:
            self.tensors = self.source = iter(self.tensors)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.tensors)

    def turned_into(self, tensors: Tensors, specs: Mapping[str, Spec] | None = None) -> "NamedTensors":
        """The same push of other tensors, made of these one by one."""
        return replace(self, tensors=tensors, specs=self.specs if specs is None else specs)

    def drain(self) -> None:
        """Have what is left made, whoever has failed meanwhile: other ranks wait for what this one sends them."""
        deque(self.source or (), maxlen=0)

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        return sum(spec.nbytes for spec in self.specs.values())

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> "NamedTensors":
        """Tensors that are there already."""
        return cls(tensors.items(), {name: Spec(one.dtype, tuple(one.shape)) for name, one in tensors.items()})
