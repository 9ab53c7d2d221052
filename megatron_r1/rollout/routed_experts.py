"""Which experts an engine has sent tokens to, as a line of JSON carries it.

`numpy.save` in base64, as vLLM's own routes write it: 4/3 bytes for each expert of each layer of each token, or 8/3
with more than 256 experts.
"""

import base64
import binascii
import io

import numpy as np


def encode(experts: np.ndarray) -> str:
    """[tokens, layers, experts a token], uint8 or uint16."""
    buffer = io.BytesIO()
    np.save(buffer, experts, allow_pickle=False)
    return base64.b64encode(buffer.getbuffer()).decode("ascii")


def decode(text: str) -> np.ndarray:
    """The way back; int16 in place of uint16, which torch cannot index by.

    Raises:
        ValueError: that is no such array.
    """
    try:
        experts: np.ndarray = np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False)
    except (binascii.Error, EOFError) as error:
        raise ValueError(str(error)) from error
    if experts.ndim != 3 or experts.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"{experts.dtype} {experts.shape}")
    return experts.astype(np.int16) if experts.dtype == np.uint16 else experts
