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

OURS = {
    "model": "set model.path, or rollout.fp8_path",
    "dtype": "set model.dtype",
    "host": "it has its engines listen on loopback; for others there is rollout.addresses",
    "port": "set rollout.port",
    "api-key": "set rollout.token_env",
    "max-model-len": "set rollout.max_model_len",
    "max-num-seqs": "set rollout.max_num_seqs",
    "weight-transfer-config": "set rollout.transport",
    "generation-config": "set rollout.temperature",
    "logprobs-mode": "the learner needs those of the distribution that was sampled from",
}
"""Arguments that the run itself gives each engine, and which given twice would not do what they say -> what to do."""


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


def refuse_ours(arguments: Sequence[str]) -> None:
    """Raises `ConfigError` if one is among `OURS`."""
    for name in by_name(arguments):
        if name in OURS:
            raise ConfigError(f"arguments: --{name} is for the run to give: {OURS[name]}")


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
