"""What a model family must say: how its Hugging Face config becomes Megatron's, and which tensor is which."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1.config.sections import ModelSection
from megatron_r1.errors import DataError
from megatron_r1.model.kernels import Machine, choose, kernel_options
from megatron_r1.model.parallel import layout_options
from megatron_r1.model.recompute import memory_options

HFConfig = dict[str, Any]
"""The contents of a Hugging Face `config.json`."""


@dataclass(frozen=True)
class Rule:
    """One Megatron tensor and the Hugging Face tensors that hold it.

    The same rules serve import, export and live weight sync.
    """

    megatron: str
    hf: tuple[str, ...]
    """The Hugging Face tensors that stand one under another in the Megatron tensor (dimension 0)."""
    copies: tuple[str, ...] = ()
    """Further Hugging Face names under which the same tensor is stored again."""
    redundant: tuple[str, ...] = ()
    """Names under which some checkpoints hold the same tensor again; accepted, but not written."""
    float32: bool = False
    """Kept in float32 whatever the model's dtype."""
    groups: int = 1
    """Each Hugging Face tensor is cut into this many blocks of rows; block i of all of them stands in the Megatron
    tensor before block i + 1 of any. (Attention: a query group's queries, its key, its value, then the next.)"""
    shares: tuple[int, ...] = ()
    """Rows of the Hugging Face tensors relative to one another; empty = all the same."""

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The Megatron tensor that the Hugging Face tensors make.

        Raises:
            DataError: a tensor's rows do not divide into the blocks, or the tensors do not fit together.
        """
        if len(parts) == 1:
            return parts[0]
        for name, part in zip(self.hf, parts, strict=True):
            if part.size(0) % self.groups:
                raise DataError(f"{name} has shape {list(part.shape)}: its rows do not divide by {self.groups} groups")
            if part.shape[1:] != parts[0].shape[1:]:
                raise DataError(f"{name} has shape {list(part.shape)}, but {self.hf[0]} {list(parts[0].shape)}")
        return torch.cat([part.unflatten(0, (self.groups, -1)) for part in parts], dim=1).flatten(0, 1)

    def cut(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The Hugging Face tensors of a Megatron tensor: the inverse of `join`. Views where `groups` is 1."""
        if len(self.hf) == 1:
            return [tensor]
        shares = self.shares or (1,) * len(self.hf)
        blocks = tensor.unflatten(0, (self.groups, sum(shares), -1))
        return [part.flatten(0, 2) for part in blocks.split(shares, dim=1)]


@runtime_checkable
class Family(Protocol):
    """One file in `families/` implements this for one or more Hugging Face architectures."""

    @staticmethod
    def transformer_config(hf: HFConfig, section: ModelSection) -> TransformerConfig:
        """Megatron's config of the model that `hf` describes."""
        ...

    @staticmethod
    def rules(hf: HFConfig) -> Iterator[Rule]:
        """Every tensor of the model, the MTP layers' included."""
        ...


def plain_modules(section: ModelSection) -> dict[str, Any]:
    """The part of every family's `TransformerConfig` that says where, with what and in what numbers it is computed."""
    machine = Machine.here()
    on_cpu = not torch.cuda.is_available()
    dtype = getattr(torch, section.dtype)
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "use_cpu_initialization": on_cpu,
        "batch_p2p_comm": not on_cpu,
        "variable_seq_lengths": True,
        "calculate_per_token_loss": True,  # one sum over all tokens of a batch, however they are cut into microbatches
        **layout_options(),
        **kernel_options(choose(section, machine), machine),
        **memory_options(section.memory),
    }


def require(hf: HFConfig, key: str, *allowed: Any) -> Any:
    """`hf[key]`, checked.

    Raises:
        DataError: the key is missing, or its value is not one of `allowed` (when any are given).
    """
    if key not in hf:
        raise DataError(f"config.json has no {key!r}, which {hf.get('architectures')} needs")
    if allowed and hf[key] not in allowed:
        choices = " or ".join(repr(value) for value in allowed)
        raise DataError(f"config.json: {key} = {hf[key]!r} is not supported, only {choices}")
    return hf[key]


_NEEDED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
_SIZES = (
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "moe_intermediate_size", "num_experts_per_tok"),
    *("n_routed_experts", "num_experts", "num_local_experts"),
    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
)
"""A config may leave these out, or say null."""


def check_sizes(hf: HFConfig) -> None:
    """Check that what is computed with is a number: a config that was edited by hand may hold anything.

    Raises:
        DataError: a size is not a positive whole number.
    """
    for key in (*_NEEDED, *_SIZES):
        if key not in hf or (hf[key] is None and key in _SIZES):
            continue
        if type(hf[key]) is not int or hf[key] < 1:
            raise DataError(f"config.json: {key} = {hf[key]!r} has to be a whole number above 0")


def refuse_other(hf: HFConfig, **only: Any) -> None:
    """Check switches that a config may leave out: each one's only supported value is that of leaving it out.

    Raises:
        DataError: one is set to another value.
    """
    for key, value in only.items():
        if hf.get(key) is not None:
            require(hf, key, value)


GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")


def gated_mlp(ours: str, theirs: str, names: tuple[str, str, str] = GATE_UP_DOWN) -> Iterator[Rule]:
    """down(silu(gate(x)) * up(x)): Megatron keeps gate and up in one matrix.

    Args:
        ours: prefix of the Megatron module.
        theirs: prefix of the Hugging Face module.
        names: what Hugging Face calls gate, up and down.
    """
    gate, up, down = (f"{theirs}.{name}.weight" for name in names)
    yield Rule(f"{ours}.linear_fc1.weight", (gate, up))
    yield Rule(f"{ours}.linear_fc2.weight", (down,))
