"""What the arguments of `vllm serve` in a run file say: by their long names, and of how many GPUs."""

from collections.abc import Sequence

from megatron_r1.errors import ConfigError

_RANKS = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size")
_SHORT = {
    "tp": "tensor-parallel-size",
    "pp": "pipeline-parallel-size",
    "dp": "data-parallel-size",
    "dpn": "data-parallel-rank",
    "dpr": "data-parallel-start-rank",
    "dpl": "data-parallel-size-local",
    "dpa": "data-parallel-address",
    "dpp": "data-parallel-rpc-port",
    "dpb": "data-parallel-backend",
    "dph": "data-parallel-hybrid-lb",
    "dpe": "data-parallel-external-lb",
    "dpm": "data-parallel-multi-port-external-lb",
    "n": "nnodes",
    "r": "node-rank",
    "q": "quantization",
    "sc": "speculative-config",
}
PLACEMENT = frozenset(
    {"headless", "nnodes", "node-rank", "master-addr", "master-port"}
    | {name for name in _SHORT.values() if name.startswith("data-parallel-") and name != "data-parallel-size"}
)
"""Arguments that say which ranks of an engine a command starts, and where the others are."""


def by_name(arguments: Sequence[str]) -> dict[str, str]:
    """Name -> value of `--name=value` and `--name value`; a name alone has none."""
    found: dict[str, str] = {}
    name = ""
    for argument in arguments:
        if argument.startswith("-"):
            name, _, value = argument.lstrip("-").partition("=")
            name = _SHORT.get(name, name).replace("_", "-")
            found[name] = value
        elif name:
            found[name] = argument
    return found


def ranks(arguments: Sequence[str]) -> tuple[int, int, int]:
    """Tensor, pipeline and data parallel size of an engine; it runs on as many GPUs as their product.

    Raises:
        ConfigError: one is no whole number above 0.
    """
    given = by_name(arguments)
    sizes = []
    for name in _RANKS:
        text = given.get(name) or "1"
        if not text.isdecimal() or not int(text):
            raise ConfigError(f"arguments: --{name}={text} is no whole number above 0")
        sizes.append(int(text))
    tensor, pipeline, data = sizes
    return tensor, pipeline, data
