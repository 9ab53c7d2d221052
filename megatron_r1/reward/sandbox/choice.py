"""Which executor a run file asks for."""

import os
from typing import Literal

from pydantic import model_validator

from megatron_r1.config.sandbox import Limits
from megatron_r1.config.section import Section
from megatron_r1.errors import ConfigError
from megatron_r1.reward.sandbox.job import Executor
from megatron_r1.reward.sandbox.local import Kind, Local, open_pool
from megatron_r1.reward.sandbox.piston import Piston
from megatron_r1.reward.sandbox.remote import Remote


class SandboxSection(Section):
    """The keys that choose an executor, wherever programs of the policy are run."""

    sandbox: Literal["bubblewrap", "rlimits", "remote", "piston"] = "bubblewrap"
    """`rlimits` protects time and memory, but not this user's files: choose it knowingly. `remote` is a server started
    by `megatron-r1 sandbox serve`, `piston` one that speaks Piston's API."""
    url: str | None = None
    """Of the server, for `remote` and `piston`."""
    token_env: str = "MEGATRON_R1_SANDBOX_TOKEN"
    """Environment variable that holds the server's token. Piston servers may have none."""
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _url_fits(self) -> "SandboxSection":
        served = self.sandbox in ("remote", "piston")
        if served and self.url is None:
            raise ValueError(f"sandbox = {self.sandbox!r} needs the `url` of its server")
        if self.url is not None and not served:
            raise ValueError(f"sandbox = {self.sandbox!r} has no use for a `url`; 'remote' and 'piston' do")
        return self


def open_executor(section: SandboxSection) -> Executor:
    """Start, or connect to, what the section asks for.

    Raises:
        ConfigError: a token is needed, and the environment does not hold it.
        EngineError: the sandbox does not work on this machine; says why and what to do.
    """
    token = os.environ.get(section.token_env)
    if section.sandbox == "remote":
        if not token:
            raise ConfigError(f"sandbox = 'remote' needs the server's token in the environment as {section.token_env}")
        return Remote(section.url or "", token)
    if section.sandbox == "piston":
        return Piston(section.url or "", token)
    return open_local(section.sandbox, section.limits, warm=2)  # of each worker: one in use, one that starts


def open_local(kind: Kind, limits: Limits, warm: int) -> Local:
    """Start an executor on this machine, with `warm` boxes waiting.

    Raises:
        EngineError: the sandbox does not work on this machine; says why and what to do.
    """
    return Local(open_pool(kind, warm, limits))
