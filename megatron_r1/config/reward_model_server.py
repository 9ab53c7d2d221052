"""[reward_models.<name>]: a reward model that the run serves to its own rewards."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from megatron_r1.config.section import Component, Section


class RewardModelServerSection(Section):
    """One vLLM server with a `<Family>ForSequenceClassification`; a reward of type `reward_model` names its address."""

    path: Path
    """A Hugging Face folder with its tokenizer."""
    port: PositiveInt = 8720
    """It listens on loopback; each reward model needs another. Rewards name it by this port: `http://127.0.0.1:8720`."""
    address: Annotated[str, Field(pattern=r"^https?://[^/]+$")] | None = None
    """Where it runs, if others have started it, such as `http://node7:8720`; the run then starts none, and rewards that
    name the port on loopback ask there."""
    token_env: str = "MEGATRON_R1_ENGINE_TOKEN"
    """Environment variable with the token that a server at `address` asks for; without one in it none is shown."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    max_model_len: PositiveInt | None = None
    """Longest prompt + response that it scores, tokens; None = what the model's config.json allows."""
    max_num_seqs: PositiveInt = 256
    """Sequences that it scores at once."""
    kv_cache_gib: PositiveFloat = 0.5
    """KV cache on CPU, GiB."""
    threads: PositiveInt = 1
    """OpenMP threads on CPU."""
    start_timeout: PositiveFloat = 300.0
    """Seconds it may take to answer its first health check."""
    arguments: list[str] = []
    """More arguments for `vllm serve`."""


def located(rewards: dict[str, Component], servers: dict[str, RewardModelServerSection]) -> dict[str, Component]:
    """The rewards, those of type `reward_model` with the `address` of the server that they name by its port."""
    elsewhere = {
        f"http://{host}:{section.port}": {"url": section.address, "token_env": section.token_env}
        for section in servers.values()
        for host in ("127.0.0.1", "localhost")
        if section.address
    }
    return {
        name: {**section, **elsewhere.get(str(section.get("url")).rstrip("/"), {})}
        if section.get("type") == "reward_model"
        else section
        for name, section in rewards.items()
    }
