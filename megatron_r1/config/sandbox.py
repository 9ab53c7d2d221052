"""Sandboxes in run files: what a program may use, and the server that runs programs for others."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from megatron_r1.config.section import Section


class Limits(Section):
    """What one run of a program may use."""

    cpu_seconds: PositiveFloat = 5.0
    wall_seconds: PositiveFloat = 10.0
    compile_seconds: PositiveFloat = 30.0
    memory_mib: PositiveInt = 512
    """Of all its processes together."""
    processes: PositiveInt = 32
    output_kib: PositiveInt = 256
    """Of standard output; a program that writes more is stopped."""
    file_mib: PositiveInt = 16
    """Longest single file."""
    tmp_mib: PositiveInt = 64
    """Its private /tmp, the only place it can write to."""
    files: NonNegativeInt = 256
    """Open file descriptors of a process."""


class SandboxServeConfig(Section):
    """`megatron-r1 sandbox serve`: this machine's sandbox for rewards on other machines."""

    host: str = "127.0.0.1"
    """Address to listen at. The token travels as plain text: put a proxy with TLS before any other address."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8600
    token_env: str = "MEGATRON_R1_SANDBOX_TOKEN"
    """Environment variable that holds the token which clients have to send."""
    sandbox: Literal["bubblewrap", "rlimits"] = "bubblewrap"
    """`rlimits` protects time and memory, but not this user's files: choose it knowingly."""
    concurrency: PositiveInt = 4
    """Requests that are worked on at once; more of them wait."""
    limits: Limits = Limits()
    """The most that a request may ask for."""
