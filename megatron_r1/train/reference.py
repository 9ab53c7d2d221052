"""The policy that the KL term is measured against, kept as a second set of weights for the same module.

A second module would double the activations' code path and, on GPU, the memory: the reference is needed
only for forward passes between updates, so its weights are exchanged with the policy's and back.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch

from megatron_r1.model.mapping import frozen, weights
from megatron_r1.train.batch import Minibatch, routed_freely
from megatron_r1.train.policy import Policy


class Reference:
    """A snapshot of a policy.

    Args:
        policy: whose module computes the reference's log-probabilities, too.
        every: steps between refreshes.
    """

    def __init__(self, policy: Policy, every: int) -> None:
        self._policy, self._every = policy, every
        self.weights = [{name: tensor.detach().cpu().clone() for name, tensor in live.items()} for live in self._live()]
        """Of each chunk of the model, by its own names."""

    def logprobs(self, minibatches: Sequence[Minibatch]) -> list[list[torch.Tensor]]:
        """Log-probabilities of the selected tokens under the reference, as `Policy.logprobs` gives them for each."""
        with self._exchanged():
            return [self._policy.logprobs(routed_freely(minibatch)) for minibatch in minibatches]

    @torch.no_grad()
    def refresh(self, done: int) -> bool:
        """`reference := policy` when `done` steps are a multiple of `every`. Returns whether it happened."""
        if done % self._every:
            return False
        _copy(self._live(), self.weights)
        return True

    def _live(self) -> list[dict[str, torch.Tensor]]:
        """The policy's own weights, without those that are never trained and so are the reference's, too."""
        return [
            {name: tensor for name, tensor in weights(chunk).items() if name not in fixed}
            for chunk, fixed in ((chunk, frozen(chunk)) for chunk in self._policy.model.chunks)
        ]

    @contextlib.contextmanager
    @torch.no_grad()
    def _exchanged(self) -> Iterator[None]:
        live = self._live()
        policy = [{name: tensor.clone() for name, tensor in chunk.items()} for chunk in live]
        _copy(self.weights, live)
        try:
            yield
        finally:
            _copy(policy, live)


def _copy(source: list[dict[str, torch.Tensor]], target: list[dict[str, torch.Tensor]]) -> None:
    for values, tensors in zip(source, target, strict=True):
        for name, tensor in tensors.items():
            tensor.copy_(values[name])
