"""Seeds of random streams that have nothing to do with one another."""

import hashlib


def stream_seed(*parts: str | int) -> int:
    """A seed in [0, 2^63), a hash of `parts`: different parts give unrelated streams."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
