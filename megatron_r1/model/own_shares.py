"""This rank's share of each tensor as numbers that can be sent, found once for many pushes of the weights.

To ask Megatron for the shares takes as long as copying tens of megabytes of them.
"""

from collections.abc import Iterator, Sequence

import torch
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.models.gpt import GPTModel

from megatron_r1.model.lora import Adapter, adapters, without_adapters
from megatron_r1.model.placement import Share, shares


class OwnShares:
    """One share of each tensor, without the adapters, which are merged into what is sent.

    Args:
        chunks: the rank's virtual pipeline stages.
    """

    def __init__(self, chunks: Sequence[GPTModel]) -> None:
        found: dict[str, Share] = {}
        self._adapters: dict[str, Adapter] = {}
        for chunk in chunks:  # whose local names are the same
            added = adapters(chunk)
            for share in shares([chunk]):
                if found.setdefault(share.name, share) is share and share.local in added:
                    self._adapters[share.name] = added[share.local]
        self.shares = without_adapters(found)
        self.views: dict[tuple[str, torch.dtype], list[tuple[str, torch.Tensor]]] = {}
        """By a share's name and the dtype that is sent: tensors to send that are views of it, and their names."""
        self._addresses = _addresses(chunks) if self._in_the_memory_of(chunks) else None

    def value(self, name: str) -> torch.Tensor:
        """The numbers that a share stands for, made when it is their turn: all at once would be a second model."""
        tensor, adapter = self.shares[name].tensor, self._adapters.get(name)
        if adapter:
            tensor = adapter.merged(tensor)
        whole: torch.Tensor = dequantize_fp8_tensor(tensor) if is_float8tensor(tensor) else tensor
        return whole

    def keep_views(self, name: str, dtype: torch.dtype, pairs: list[tuple[str, torch.Tensor]]) -> None:
        """Have `views` give them from now on, if they are views of a share."""
        if (share := self.shares.get(name)) is None or is_float8tensor(share.tensor):
            return
        memory = _memory(share.tensor)
        if all(_memory(tensor) == memory for _, tensor in pairs):
            self.views[name, dtype] = pairs

    def are_of(self, chunks: Sequence[GPTModel]) -> bool:
        """Whether these are still where the model's numbers are: each of its tensors is where it was.

        No other tensor can have come to such a place meanwhile, because the shares keep their memory.
        """
        return self._addresses is not None and self._addresses == _addresses(chunks)

    def _in_the_memory_of(self, chunks: Sequence[GPTModel]) -> bool:
        """No share is a copy that was made for it, as of weights in 8 bits."""
        tensors = list(_tensors(chunks))
        if any(map(is_float8tensor, tensors)):
            return False
        memory = set(map(_memory, tensors))
        return all(_memory(share.tensor) in memory for share in self.shares.values())


def _tensors(chunks: Sequence[GPTModel]) -> Iterator[torch.Tensor]:
    for chunk in chunks:
        for module in chunk.modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    yield tensor


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _addresses(chunks: Sequence[GPTModel]) -> list[int]:
    return [tensor.data_ptr() for tensor in _tensors(chunks)]
