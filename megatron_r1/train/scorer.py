"""`Scorer`: a model with a scalar head that is trained - values out, updates in."""

import torch

from megatron_r1.train.batch import Minibatch
from megatron_r1.train.policy import TrainedModel


class Scorer(TrainedModel):
    """A reward model or a critic: a `ScalarModel` (`build_model(..., head="scalar")`) whose losses are given values."""

    def values(self, minibatch: Minibatch) -> list[torch.Tensor]:
        """The value at every selected position, float32. One `[selected]` tensor a microbatch."""
        return self.outputs(minibatch)
