"""The version of the NCCL that a process has loaded, which LD_PRELOAD may have exchanged.

`torch.cuda.nccl.version()` says which headers torch was compiled with, whatever is loaded (torch/csrc/cuda/nccl.cpp).
"""

import ctypes

LIBRARY = "libnccl.so.2"
"""By this name the loader gives what the process has loaded already."""


def version() -> tuple[int, int, int]:
    """Major, minor and patch. In a process that has imported torch, which brings the library.

    Raises:
        OSError: there is no such library.
    """
    code = ctypes.c_int()
    ctypes.CDLL(LIBRARY).ncclGetVersion(ctypes.byref(code))
    # Since 2.9 (nccl.h, NCCL_VERSION).
    return code.value // 10000, code.value // 100 % 100, code.value % 100
