"""[reward_models.<name>]: a reward model that the run serves to its own rewards."""

from pathlib import Path
from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from megatron_r1.config.section import Section


class RewardModelServerSection(Section):
    """One vLLM server with a `<Family>ForSequenceClassification`; a reward of type `reward_model` names its address."""

    path: Path
    """A Hugging Face folder with its tokenizer."""
    port: PositiveInt = 8720
    """It listens on loopback; each reward model needs another."""
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
