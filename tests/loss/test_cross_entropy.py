"""Cross-entropy against torch's."""

import torch
import torch.nn.functional as F

from megatron_r1.loss.base import LossInputs
from megatron_r1.loss.cross_entropy import CrossEntropy


def test_equals_torch() -> None:
    logits, labels = torch.randn(11, 7), torch.randint(7, (11,))
    logprobs = torch.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0]
    loss = CrossEntropy()
    weights = torch.tensor(loss.token_weights([4, 7])).repeat_interleave(torch.tensor([4, 7]))
    value, metrics = loss(logprobs, LossInputs(weights, torch.zeros(11, dtype=torch.long)))
    torch.testing.assert_close(value, F.cross_entropy(logits, labels))
    torch.testing.assert_close(metrics["loss"], value)
