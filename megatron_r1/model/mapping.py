"""Weights between Megatron modules and Hugging Face names, both ways, by one family's rules."""

from collections.abc import Iterator, Mapping

import torch
from megatron.core.models.gpt import GPTModel

from megatron_r1.errors import DataError
from megatron_r1.model.family import Rule
from megatron_r1.model.hf_folder import Weights
from megatron_r1.model.lora import adapters, without_adapters


class WeightMap:
    """The two-way table of one model.

    `passthrough` holds Hugging Face tensors that the model was not built with (the MTP layers of a policy
    that does not train them); they leave as they came.
    """

    def __init__(self, rules: Iterator[Rule]) -> None:
        self.rules = list(rules)
        self.passthrough: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def load(self, model: GPTModel, reader: Weights) -> None:
        """Fill `model` from a Hugging Face checkpoint.

        Raises:
            DataError: a tensor is missing, has the wrong shape, or is known to no rule.
        """
        ours = weights(model)
        known: set[str] = set()
        for rule in self.rules:
            known.update(rule.hf, rule.copies, rule.redundant)
            missing = [name for name in rule.hf if name not in reader]
            target = ours.pop(rule.megatron, None)
            if target is None:
                self.passthrough.update({name: reader[name] for name in (*rule.hf, *rule.copies) if name in reader})
                continue
            if missing:
                raise DataError(f"the checkpoint has no {', '.join(missing)}, which fill {rule.megatron}")
            value = rule.join([reader[name] for name in rule.hf])
            if value.shape != target.shape:
                raise DataError(
                    f"{' + '.join(rule.hf)} has shape {list(value.shape)}, "
                    f"but config.json makes {rule.megatron} {list(target.shape)}"
                )
            for name in rule.redundant:
                if name in reader and not torch.equal(reader[name], value):
                    raise DataError(
                        f"the checkpoint's {name} differs from {rule.hf[0]}, but config.json says that they are one: "
                        "set tie_word_embeddings = false there if they are two"
                    )
            target.copy_(value)
        if ours:
            raise DataError(f"no rule fills {len(ours)} tensors of the model, for example {next(iter(ours))}")
        unknown = [name for name in reader if name not in known]
        if unknown:
            raise DataError(f"no rule knows {len(unknown)} tensors of the checkpoint, for example {unknown[0]}")

    def export(self, model: GPTModel, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Hugging Face names and values; views of the model's own memory where dtype and order already fit.

        Adapters are merged into the weights that they belong to.
        """
        ours, added = without_adapters(weights(model)), adapters(model)
        for rule in self.rules:
            if rule.megatron not in ours:
                continue
            tensor = ours.pop(rule.megatron).detach()
            if adapter := added.get(rule.megatron):
                tensor = adapter.merged(tensor)
            tensor = tensor if rule.float32 else tensor.to(dtype)
            yield from zip(rule.hf, rule.cut(tensor), strict=True)
            yield from ((name, tensor) for name in rule.copies)
        if ours:
            raise DataError(f"no rule exports {len(ours)} tensors of the model, for example {next(iter(ours))}")
        yield from self.passthrough.items()


def weights(model: GPTModel) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, without the wrappers' prefixes and empty extra states."""
    state: Mapping[str, torch.Tensor | None] = model.state_dict()
    return {name: tensor for name, tensor in state.items() if torch.is_tensor(tensor)}


def frozen(model: GPTModel) -> set[str]:
    """Names of the weights that are not trained (LoRA's base)."""
    return {name for name, param in model.named_parameters() if not param.requires_grad}
