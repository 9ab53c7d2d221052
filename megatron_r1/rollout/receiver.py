"""Runs inside vLLM's workers: takes new weights from files, over NCCL or by CUDA IPC, as the trainer says.

vLLM's weight-transfer API has engines for NCCL and CUDA IPC, but an engine of vLLM takes one of them for all its life,
and neither works on CPU. So one engine of ours is registered with vLLM's factory: it reads files by itself and leaves
the rest to vLLM's own two. vLLM imports this module in every worker by
`--worker-extension-cls megatron_r1.rollout.receiver.Receiver`, which needs no installed entry point.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.logger import init_logger
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from megatron_r1.rollout.checksum import checksum, checksum_of_all
from megatron_r1.rollout.engine import BACKEND, PREFLIGHT
from megatron_r1.rollout.weights_files import read, version_of

logger = init_logger("vllm.megatron_r1")  # vLLM writes what its own loggers say

DIRECT = {"nccl": NCCLWeightTransferEngine, "ipc": IPCWeightTransferEngine}
"""Transports without a file, and who receives by them."""


@dataclass
class InitInfo(WeightTransferInitInfo):
    """How the trainer is reached; a file needs no such thing."""

    transport: str
    """Of `DIRECT`."""
    settings: dict[str, Any]
    """As that engine's own class of init info takes them."""

    def __post_init__(self) -> None:
        if self.transport not in DIRECT:
            raise ValueError(f"no transport {self.transport!r}, but {', '.join(DIRECT)}")


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Where tensors of this update are."""

    path: str | None = None
    """A safetensors file with the names of a Hugging Face checkpoint, or a folder of them with its index."""
    transport: str | None = None
    """Or the transport by which they come."""
    settings: dict[str, Any] = field(default_factory=dict)
    """As that engine's own class of update info takes them."""
    sampled: list[str] = field(default_factory=list)
    """Names of the tensors whose checksums the trainer will ask for."""
    version: int | None = None
    """Of the weights; a file says its own."""


class WeightReceiver(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads weights of checkpoint format through vLLM's layer-wise reload, as at start."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._arguments = arguments
        self._direct: dict[str, WeightTransferEngine[Any, Any]] = {}
        self._begun = self._preflight = False
        self.received: dict[str, str] = {}
        """Checksums of tensors of this update."""

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        engine = DIRECT[init_info.transport](*self._arguments)
        engine.init_transfer_engine(engine.parse_init_info(init_info.settings))
        self._direct[init_info.transport] = engine

    def start_weight_update(self) -> None:
        if self._begun:
            # vLLM would add these tensors to those of the update that has failed, and take a layer that has some twice
            # for complete.
            with _silent_about_layers():
                finalize_layerwise_reload(self.model, self.model_config)
        self.received, self._begun, self._preflight = {}, True, False
        repack_experts(self.model)
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        if update_info.path is None:
            self._preflight = update_info.version == PREFLIGHT
            self._receive_directly(update_info)
            return
        self.model.load_weights(read(update_info.path, self.received))
        version, every = version_of(update_info.path), checksum_of_all(self.received)
        self._preflight = version == str(PREFLIGHT)
        logger.info("received weights %s: %d tensors, checksum %s", version, len(self.received), every)

    def finish_weight_update(self) -> None:
        with _silent_about_layers() if self._preflight else nullcontext():
            finalize_layerwise_reload(self.model, self.model_config)
        repack_lm_head(self.model)
        self._begun = False
        if "ipc" in self._direct:
            self._direct["ipc"].shutdown()  # of CUDA IPC it gives the trainer's buffer back, and holds nothing else

    def compare(self, sums: Mapping[str, str], first: int) -> None:
        """Compare tensors of this update with what was sent.

        Here, and not by the trainer, because vLLM hands on what workers return of an engine's first data-parallel
        replica alone, but what they raise of all.

        Args:
            sums: checksums of tensors as the trainer has sent them.
            first: rank of the engine's first worker in the trainer's group.

        Raises:
            ValueError: one differs.
        """
        own = self.parallel_config
        rank = first + own.data_parallel_index * own.world_size + own.rank  # as vLLM numbers them
        for name, sent in sums.items():
            if (received := self.received.get(name)) != sent:
                raise ValueError(f"rank {rank} has got {name} with checksum {received}, but {sent} was sent")

    def shutdown(self) -> None:
        for engine in self._direct.values():
            engine.shutdown()
        self._direct = {}

    def _receive_directly(self, update_info: UpdateInfo) -> None:
        if (engine := self._direct.get(update_info.transport or "")) is None:
            raise RuntimeError(f"no connection by {update_info.transport!r} to the trainer has been made")
        engine.model = _Listening(self.model, set(update_info.sampled), self.received)
        engine.receive_weights(engine.parse_update_info(update_info.settings))


@contextmanager
def _silent_about_layers() -> Iterator[None]:
    """Without a warning for each layer that was not loaded, where that is meant."""
    reload = logging.getLogger(finalize_layerwise_reload.__module__)
    level = reload.level
    reload.setLevel(logging.ERROR)
    try:
        yield
    finally:
        reload.setLevel(level)


class _Listening:
    """A model to load weights into that notes checksums of some."""

    def __init__(self, model: torch.nn.Module, sampled: set[str], received: dict[str, str]) -> None:
        self._model, self._sampled, self._received = model, sampled, received

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        pairs = list(weights)
        self._received.update((name, checksum(tensor)) for name, tensor in pairs if name in self._sampled)
        return self._model.load_weights(pairs)


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
    """Worker extension: naming it is what makes the workers import this module."""

    weight_transfer_engine: WeightReceiver
    """The worker's own, whose class this one is mixed into."""

    def compare_received(self, sums: Mapping[str, str], first: int) -> None:
        """For the trainer: see `WeightReceiver.compare`."""
        self.weight_transfer_engine.compare(sums, first)


if BACKEND not in WeightTransferEngineFactory._registry:  # vLLM offers no public way to ask
    WeightTransferEngineFactory.register_engine(BACKEND, WeightReceiver)
