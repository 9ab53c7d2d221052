"""The newest metrics of a run, for Prometheus to fetch at `/metrics`."""

import re
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, start_http_server

from megatron_r1.errors import ConfigError

PREFIX = "megatron_r1_"
_FOREIGN = re.compile(r"[^a-zA-Z0-9_]")


class Prometheus:
    """Gauges named `megatron_r1_<metric>` with the label `run`; what Prometheus has no letters for becomes `_`.

    Args:
        address: of this machine, that is listened at.
        port: likewise.
        run: the run's name.

    Raises:
        ConfigError: the port is in use.
    """

    def __init__(self, address: str, port: int, run: str) -> None:
        self._registry, self._run = CollectorRegistry(), run
        self._gauges: dict[str, Gauge] = {}
        try:
            self._server, self._thread = start_http_server(port, address, self._registry)
        except OSError as error:
            raise ConfigError(f"report.prometheus_port = {port}: {error.strerror}; choose another port") from error

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """These replace those of the step before; others stay."""
        for name, value in {"step": step, **figures}.items():
            safe = PREFIX + _FOREIGN.sub("_", name)
            if safe not in self._gauges:
                self._gauges[safe] = Gauge(safe, name, ["run"], registry=self._registry)
            self._gauges[safe].labels(self._run).set(value)

    def summary(self, figures: Mapping[str, Any]) -> None:
        """A run that has ended has no endpoint."""

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
