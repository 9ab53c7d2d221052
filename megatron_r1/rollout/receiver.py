"""Runs inside vLLM's workers: takes new weights from a safetensors file in shared memory, on CPU or GPU.

vLLM's weight-transfer API has transports for NCCL and CUDA IPC but none that works on CPU; this one is registered with
its factory under the name `megatron_r1_shm`. vLLM imports it in every worker by
`--worker-extension-cls megatron_r1.rollout.receiver.Receiver`, which needs no installed entry point.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.logger import init_logger
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from megatron_r1.rollout.checksum import KEY, VERSION, checksum, checksum_of_all
from megatron_r1.rollout.engine import TRANSPORT

logger = init_logger("vllm.megatron_r1")  # vLLM writes what its own loggers say


@dataclass
class InitInfo(WeightTransferInitInfo):
    """A file needs no rendezvous."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Where this update's weights are."""

    path: str
    """A safetensors file with the names of a Hugging Face checkpoint."""


class SharedMemoryEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads weights of checkpoint format through vLLM's layer-wise reload, as at start."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Nothing to set up."""

    def start_weight_update(self) -> None:
        repack_experts(self.model)
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        received: dict[str, str] = {}
        self.model.load_weights(read(update_info.path, received))
        version = version_of(update_info.path)
        logger.info("received weights %s: %d tensors, checksum %s", version, len(received), checksum_of_all(received))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        repack_lm_head(self.model)

    def shutdown(self) -> None:
        """Nothing to release."""


def read(path: str, received: dict[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor, one at a time, of a safetensors file; their checksums go to `received`.

    Raises:
        ValueError: a tensor is not what the trainer wrote, as the file's metadata tell.
    """
    with safe_open(path, "pt") as file:
        sent = json.loads((file.metadata() or {}).get(KEY, "{}"))
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            tensor = file.get_tensor(name)
            received[name] = checksum(tensor)
            if received[name] != sent.get(name, received[name]):
                raise ValueError(f"{name} in {path} has checksum {received[name]}, but {sent[name]} was sent")
            yield name, tensor


def version_of(path: str) -> str:
    """Which weights a file says that it holds."""
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get(VERSION, "of no version")


def repack_experts(model: torch.nn.Module) -> None:
    """Make the coming load pack the experts' weights again for the CPU kernel.

    Upstream bug (vLLM 0.32, CPU): the unquantised MoE method packs its weights only while it has no kernel, that is on
    the first load; after any later one the kernel reads unpacked weights as if packed, silently. Can go when a reload
    of a MoE model on CPU gives a fresh engine's logprobs without it.
    """
    if not current_platform.is_cpu():
        return
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None and hasattr(method, "moe_kernel"):
            method.moe_kernel = None


def repack_lm_head(model: torch.nn.Module) -> None:
    """Pack an output head again that shares its weight with the embedding.

    Upstream bug (vLLM 0.32, CPU): a tied head is not reloaded itself, so it keeps multiplying by the oneDNN copy of the
    old embedding, silently. Can go when a reload of a tied model on CPU gives a fresh engine's logprobs without it.
    """
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)


class Receiver:
    """Worker extension without methods: naming it is what makes the workers import this module."""


if TRANSPORT not in WeightTransferEngineFactory._registry:  # vLLM offers no public way to ask
    WeightTransferEngineFactory.register_engine(TRANSPORT, SharedMemoryEngine)
