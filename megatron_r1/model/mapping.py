"""Weights between Megatron modules and Hugging Face names, both ways, by one family's rules."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from megatron_r1.errors import DataError
from megatron_r1.model.collect import FIRST, Route, Sender, collected, routes, senders
from megatron_r1.model.family import Rule
from megatron_r1.model.hf_folder import Weights
from megatron_r1.model.own_shares import OwnShares
from megatron_r1.model.parallel import is_first_rank
from megatron_r1.model.placement import Share, shares
from megatron_r1.model.safetensors_file import Spec

EXPERTS = ".experts."
"""In Megatron's names of routed experts."""


class WeightMap:
    """The two-way table of one model.

    `passthrough` holds, on the first rank, Hugging Face tensors that the model was not built with (the MTP layers of a
    policy that does not train them); they leave as they came.
    """

    def __init__(self, rules: Iterator[Rule]) -> None:
        self.rules = list(rules)
        self.passthrough: dict[str, torch.Tensor] = {}
        self._senders: dict[str, list[Sender]] | None = None
        self._routes: dict[str, Route] | None = None
        self._own: OwnShares | None = None
        self._specs: dict[tuple[torch.dtype, frozenset[str] | None], dict[str, Spec]] = {}

    @torch.no_grad()
    def load(self, chunks: Sequence[GPTModel], reader: Weights) -> None:
        """Fill this rank's part of a model from a Hugging Face checkpoint. All ranks call it together.

        Raises:
            DataError: a tensor is missing, has the wrong shape, or is known to no rule.
        """
        ours = _by_name(chunks)
        built = _anywhere(ours)
        known: set[str] = set()
        for rule in self.rules:
            known.update(rule.hf, rule.copies, rule.redundant)
            missing = [name for name in rule.hf if name not in reader]
            if rule.megatron not in built and is_first_rank():
                self.passthrough.update({name: reader[name] for name in (*rule.hf, *rule.copies) if name in reader})
            targets = ours.pop(rule.megatron, ())
            if not targets:
                continue
            if missing:
                raise DataError(f"the checkpoint has no {', '.join(missing)}, which fill {rule.megatron}")
            value = _joined(rule, reader, targets[0].shape)
            for target in targets:
                target.fill(value)
        if ours:
            raise DataError(f"no rule fills {len(ours)} tensors of the model, for example {next(iter(ours))}")
        unknown = [name for name in reader if name not in known]
        if unknown:
            raise DataError(f"no rule knows {len(unknown)} tensors of the checkpoint, for example {unknown[0]}")

    def export(
        self,
        chunks: Sequence[GPTModel],
        dtype: torch.dtype,
        only: frozenset[str] | None = None,
        spread: bool = False,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Hugging Face names and whole values on the first rank, nothing on the others, which have to iterate, too.

        Views of the model's own memory where the rank holds all of a tensor, and dtype and order already fit. Adapters
        are merged into the weights that they belong to. `only`: Megatron's names of those that are wanted.
        `spread`: each on one rank that holds a part of it (`collect.routes`), instead of all on the first.
        """
        ours, sent_by = self._owned(chunks), self._sent_by(chunks)
        routed = self._routed(chunks) if spread else {}
        for rule in self.rules:
            if rule.megatron in sent_by and (only is None or rule.megatron in only):
                route = routed[rule.megatron] if spread else Route(FIRST, sent_by[rule.megatron])
                yield from self._pairs(rule, route, ours, dtype)
        if only is None:
            yield from self.passthrough.items()

    @staticmethod
    def _pairs(rule: Rule, route: Route, ours: OwnShares, dtype: torch.dtype) -> list[tuple[str, torch.Tensor]]:
        name, kept = rule.megatron, None if rule.float32 else dtype
        # Another rank may want what this one has as views.
        if route.root == dist.get_rank() and (views := ours.views.get((name, dtype))):
            return views
        tensor = collected(route.senders, partial(ours.value, name), kept, route.root)
        if tensor is None:
            return []
        pairs = list(zip(rule.hf, rule.cut(tensor), strict=True)) + [(copy, tensor) for copy in rule.copies]
        ours.keep_views(name, dtype, pairs)
        return pairs

    def specs(
        self, chunks: Sequence[GPTModel], dtype: torch.dtype, only: frozenset[str] | None = None
    ) -> dict[str, Spec]:
        """What `export` yields on the first rank, in its order, without values. All ranks call it together."""
        if (found := self._specs.get((dtype, only))) is None:
            found = self._specs[dtype, only] = self._specs_of(self._sent_by(chunks), dtype, only)
        if only is not None:
            return dict(found)
        return found | {name: Spec(kept.dtype, tuple(kept.shape)) for name, kept in self.passthrough.items()}

    def _specs_of(
        self, sent_by: Mapping[str, list[Sender]], dtype: torch.dtype, only: frozenset[str] | None
    ) -> dict[str, Spec]:
        found: dict[str, Spec] = {}
        for rule in self.rules:
            holders = sent_by.get(rule.megatron)
            if holders is None or (only is not None and rule.megatron not in only):
                continue
            kept = holders[0].dtype if rule.float32 else dtype
            parts = rule.cut(torch.empty(holders[0].shape, dtype=kept, device="meta"))
            names = (*zip(rule.hf, parts, strict=True), *((name, parts[0]) for name in rule.copies))
            found |= {name: Spec(part.dtype, tuple(part.shape)) for name, part in names}
        return found

    def of_each_stage(self, chunks: Sequence[GPTModel]) -> frozenset[str]:
        """Megatron's names of each pipeline stage's largest tensor, and of its largest of a routed expert.

        Of equal ones the last: experts are then another rank's than the rest. All ranks call it together.
        """
        largest: dict[tuple[int, bool], tuple[int, str]] = {}
        for name, holders in self._sent_by(chunks).items():
            key, found = (holders[0].stage, EXPERTS in name), (math.prod(holders[0].shape), name)
            if key not in largest or found[0] >= largest[key][0]:
                largest[key] = found
        return frozenset(name for _, name in largest.values())

    def _sent_by(self, chunks: Sequence[GPTModel]) -> dict[str, list[Sender]]:
        if self._senders is None:
            self._senders = senders(self._owned(chunks).shares)
            if left := self._senders.keys() - {rule.megatron for rule in self.rules}:
                raise DataError(f"no rule exports {len(left)} tensors of the model, for example {min(left)}")
        return self._senders

    def _routed(self, chunks: Sequence[GPTModel]) -> dict[str, Route]:
        if self._routes is None:
            self._routes = routes(self._sent_by(chunks))
        return self._routes

    def _owned(self, chunks: Sequence[GPTModel]) -> OwnShares:
        if self._own is None or not self._own.are_of(chunks):
            self._own = OwnShares(chunks)
        return self._own


@dataclass(frozen=True)
class Export:
    """A model's tensors under their Hugging Face names, collected anew each time that all ranks iterate it."""

    map: WeightMap
    chunks: Sequence[GPTModel]
    dtype: torch.dtype
    only: frozenset[str] | None = None
    """Megatron's names of those that are wanted."""
    spread: bool = False
    """Each on one of the ranks that hold a part of it, instead of all on the first."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.map.export(self.chunks, self.dtype, self.only, self.spread)

    def specs(self) -> dict[str, Spec]:
        """See `WeightMap.specs`."""
        return self.map.specs(self.chunks, self.dtype, self.only)

    def of_each_stage(self) -> "Export":
        """A few of them: see `WeightMap.of_each_stage`."""
        return replace(self, only=self.map.of_each_stage(self.chunks))

    def spread_out(self) -> "Export":
        """The same, of which each rank gets its share."""
        return replace(self, spread=True)


def _joined(rule: Rule, reader: Weights, shape: tuple[int, ...]) -> torch.Tensor:
    value = rule.join([reader[name] for name in rule.hf])
    if tuple(value.shape) != shape:
        raise DataError(
            f"{' + '.join(rule.hf)} has shape {list(value.shape)}, but config.json makes {rule.megatron} {list(shape)}"
        )
    for name in rule.redundant:
        if name in reader and not torch.equal(reader[name], value):
            raise DataError(
                f"the checkpoint's {name} differs from {rule.hf[0]}, but config.json says that they are one: "
                "set tie_word_embeddings = false there if they are two"
            )
    return value


def _by_name(chunks: Sequence[GPTModel]) -> dict[str, list[Share]]:
    """Name in the whole model -> this rank's copies of its part: of an embedding, a pipeline stage may have two."""
    found: dict[str, list[Share]] = {}
    for share in shares(chunks):
        found.setdefault(share.name, []).append(share)
    return found


def _anywhere(ours: Iterable[str]) -> set[str]:
    """Names that some rank has."""
    names: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(names, list(ours))
    return set().union(*names)


def weights(model: GPTModel) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, without the wrappers' prefixes and empty extra states."""
    state: Mapping[str, torch.Tensor | None] = model.state_dict()
    return {name: tensor for name, tensor in state.items() if torch.is_tensor(tensor)}


def frozen(model: GPTModel) -> set[str]:
    """Names of the weights that are not trained (LoRA's base)."""
    return {name for name, param in model.named_parameters() if not param.requires_grad}
