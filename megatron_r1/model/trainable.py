"""A model with what trains it, as the optimizer builds it and a checkpoint saves it."""

from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


@dataclass
class Trainable:
    """A model ready to be trained."""

    ddp: list[DistributedDataParallel]
    """Each chunk of the model (`BuiltModel.chunks`), wrapped."""
    chunks: list[GPTModel]
    """The same without their wrappers."""
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
