"""What a GPU machine has for megatron-r1: the device, versions, what can be imported, one product in FP8; in seconds.

python tools/gpu_probe.py
"""

import importlib
import platform
import time
from importlib.metadata import PackageNotFoundError, version

import torch

from megatron_r1.doctor import nccl

PACKAGES = (
    *("torch", "transformers", "megatron-core", "transformer-engine", "transformer-engine-torch", "vllm"),
    *("flash-attn", "apex", "deep-ep", "nvidia-modelopt", "nvidia-nccl-cu13", "nvidia-cudnn-cu13", "numpy", "pydantic"),
)
MODULES = (
    *("megatron_r1.model.build", "transformer_engine.pytorch", "fused_weight_gradient_mlp_cuda", "deep_ep"),
    *("vllm", "modelopt.torch.quantization"),
)


def main() -> None:
    print(f"Python {platform.python_version()}")
    for name in PACKAGES:
        try:
            print(f"{name} {version(name)}")
        except PackageNotFoundError:
            print(f"{name}: none")
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        free, total = torch.cuda.mem_get_info()
        print(f"{torch.cuda.get_device_name()}, sm_{major}{minor}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
        print(f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, NCCL {nccl.version()}")
    else:
        print("no CUDA device")
    for name in MODULES:
        started = time.perf_counter()
        try:
            importlib.import_module(name)
            print(f"import {name}: {time.perf_counter() - started:.1f} s")
        except Exception as error:  # a library that does not load raises anything; all of them are wanted
            print(f"import {name}: {type(error).__name__}: {error}")
    if torch.cuda.is_available():
        fp8_layer()


def fp8_layer() -> None:
    """A linear layer of Transformer Engine in blocks, forward and backward."""
    try:
        recipes = importlib.import_module("transformer_engine.common.recipe")
        engine = importlib.import_module("transformer_engine.pytorch")
        layer = engine.Linear(1024, 1024, bias=False, params_dtype=torch.bfloat16)
        inputs = torch.randn(256, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        with engine.fp8_autocast(enabled=True, fp8_recipe=recipes.Float8BlockScaling()):
            output = layer(inputs)
        output.sum().backward()
        exact = inputs.detach().double() @ layer.weight.detach().double().t()
        error = float((output.double() - exact).norm() / exact.norm())
        print(f"Transformer Engine, FP8 in blocks: relative error {error:.4f} of a product, backward done")
    except Exception as error:
        print(f"Transformer Engine, FP8 in blocks: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
