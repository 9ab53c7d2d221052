"""The newest metrics of a run, for Prometheus to fetch at `/metrics`."""

import re
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, start_http_server

from megatron_r1.errors import ConfigError

PREFIX = "megatron_r1_"
BY_ENGINE = "fleet_"
_FOREIGN = re.compile(r"[^a-zA-Z0-9_]")


class Prometheus:
    """Gauges named `megatron_r1_<metric>` with the label `run`; what Prometheus has no letters for becomes `_`.

    Figures of single engines, `fleet_<what>/<engine>`, are one gauge `megatron_r1_fleet_<what>` that has the label
    `engine`, too.

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
            what, _, engine = name.partition("/") if name.startswith(BY_ENGINE) else (name, "", "")
            labels = {"run": self._run} | ({"engine": engine} if engine else {})
            safe = PREFIX + _FOREIGN.sub("_", what)
            if safe not in self._gauges:
                self._gauges[safe] = Gauge(safe, what, list(labels), registry=self._registry)
            self._gauges[safe].labels(**labels).set(value)

    def summary(self, figures: Mapping[str, Any]) -> None:
        """A run that has ended has no endpoint."""

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
