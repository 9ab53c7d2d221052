"""The sampling temperature on logits, against float32 arithmetic as engines do it."""

from types import SimpleNamespace
from typing import Any, cast

import torch

from megatron_r1.model.logits import LogitsObserver


class Head(torch.nn.Module):
    """An output layer that gives what it is given, as Megatron's give it."""

    def forward(self, logits: torch.Tensor) -> tuple[torch.Tensor, None]:
        return logits, None


def test_bfloat16_logits_are_divided_without_rounding_them_again() -> None:
    """At T = 0.7 a quotient in bfloat16 put log-probabilities 0.02 nats off, as far as `logprob_bound` allows."""
    model = SimpleNamespace(output_layer=Head(), config=SimpleNamespace(mtp_num_layers=None))
    LogitsObserver(cast(Any, model), temperature=0.7)
    logits = (4 * torch.randn(50, 4, 400, generator=torch.Generator().manual_seed(0))).bfloat16()
    found, _ = model.output_layer(logits)
    expected = torch.log_softmax(logits.float() / 0.7, -1)
    torch.testing.assert_close(torch.log_softmax(found.float(), -1), expected, atol=1e-5, rtol=0)
    assert (torch.log_softmax((logits / 0.7).float(), -1) - expected).abs().mean() > 0.01
