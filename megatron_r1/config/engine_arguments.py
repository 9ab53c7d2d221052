"""What the arguments of `vllm serve` in a run file say: by their long names, and of how many GPUs."""

from collections.abc import Sequence

from megatron_r1.errors import ConfigError

_RANKS = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size")
_SHORT = {
    "tp": "tensor-parallel-size",
    "pp": "pipeline-parallel-size",
    "dp": "data-parallel-size",
    "q": "quantization",
    "sc": "speculative-config",
}


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
