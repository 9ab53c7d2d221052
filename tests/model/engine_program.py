"""A model with plain torch's layers and with those of Transformer Engine's spec, one beside the other on a CPU.

``python -m tests.model.engine_program CONFIG_JSON FOLDER`` prints what is the same, as JSON. Transformer Engine is
`engine_stand_in`.
"""

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tests.model import engine_stand_in

engine_stand_in.install()

from megatron_r1.config.sections import ModelSection, OptimSection, ParallelSection  # noqa: E402
from megatron_r1.loss.cross_entropy import CrossEntropy  # noqa: E402
from megatron_r1.model import build, family, hf_folder, kernels, sharding  # noqa: E402
from megatron_r1.model.parallel import initialize  # noqa: E402
from megatron_r1.model.placement import shares  # noqa: E402
from megatron_r1.train.batch import from_rows  # noqa: E402
from megatron_r1.train.policy import Policy  # noqa: E402

HOPPER = dataclasses.replace(kernels.Machine.here(), cuda=(13, 0), capability=(9, 0))
ENGINE = {"layers": "transformer_engine", "permute_fusion": False, "cross_entropy_fusion": "none"}
"""No kernels for the two; in float32, which the stand-in has."""


class _Hopper:
    """In the place of the class that asks torch."""

    @staticmethod
    def here() -> kernels.Machine:
        return HOPPER


def built(folder: Path, load: bool, engine: bool) -> build.BuiltModel:
    """In float32, which no rule allows for Transformer Engine's attention and which shows more."""
    values = {"path": folder, "load_weights": load, "dtype": "float32", "init_std": 0.08, "balance_loss_coef": 1e-3}
    if engine:
        build.Machine = family.Machine = _Hopper  # type: ignore[misc]
        build.refuse = lambda rules, setting: None
        values["kernels"] = ENGINE
    return build.build_model(ModelSection.model_validate(values), 128)


def losses(model: build.BuiltModel, packed: bool) -> torch.Tensor:
    from megatron.core.packed_seq_params import PackedSeqParams  # megatron_r1.model must have prepared Megatron before

    tokens = torch.arange(96)[None] * 7 % 100
    ends = torch.tensor([0, 40, 96], dtype=torch.int32)
    packing = PackedSeqParams("thd", ends, ends, max_seqlen_q=56, max_seqlen_kv=56) if packed else None
    module = model.module.train()
    module.zero_grad()
    loss: torch.Tensor = module(tokens, torch.arange(96)[None], None, labels=tokens, packed_seq_params=packing)
    loss.sum().backward()
    return loss.detach()


def gradients(model: build.BuiltModel) -> dict[str, torch.Tensor]:
    """By the names of the whole model."""
    params = dict(model.module.named_parameters())
    return {share.name: params[share.local].grad for share in shares(model.chunks) if share.local in params}


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-12))


def trained(model: build.BuiltModel) -> list[float]:
    """Losses of three steps."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

    MoEAuxLossAutoScaler.main_loss_backward_scale = None  # of another shape where Megatron's schedule has not set it
    MTPLossAutoScaler.main_loss_backward_scale = torch.tensor(1.0)
    policy = Policy(model, OptimSection(lr=1e-3), 3)
    tokens = torch.arange(4 * 64).view(4, 64) * 7 % 100
    batch = [from_rows(tokens[:2], tokens[:2].roll(-1, 1), 256), from_rows(tokens[2:], tokens[2:].roll(-1, 1), 256)]
    return [policy.step(batch, CrossEntropy())["loss"] for _ in range(3)]


def keys(model: build.BuiltModel) -> set[str]:
    """Keys and places of what a checkpoint would hold."""
    sharded = model.module.sharded_state_dict(prefix="", metadata={})
    objects = {entry.unique_key for entry in sharded.values() if isinstance(entry, sharding.ShardedObject)}
    tensors = [entry for entry in sharded.values() if not isinstance(entry, sharding.ShardedObject)]
    return objects | {str(sharding._piece(part)) for entry in tensors for part in sharding._parts(entry)}


def main() -> None:
    folder = Path(sys.argv[2])
    (folder / "config.json").write_text(sys.argv[1])
    initialize(ParallelSection(), seed=5)
    plain = built(folder, load=False, engine=False)
    for name, tensor in (*plain.module.named_parameters(), *plain.module.named_buffers()):
        if "norm" in name or name.endswith("expert_bias"):
            tensor.data += 0.1 * torch.randn_like(tensor)
    hf_folder.write(folder / "hf", plain.hf, plain.export(torch.float32), folder)
    engine = built(folder / "hf", load=True, engine=True)
    exported = dict(engine.export(torch.float32))
    found: dict[str, Any] = {
        "said": engine.kernels.said,
        "modules": Counter(type(module).__name__ for module in engine.module.modules()),
        "exported": {name: torch.equal(tensor, exported.pop(name)) for name, tensor in plain.export(torch.float32)},
        "left": list(exported),
        "checkpoint": [sorted(keys(one) - keys(other)) for one, other in ((plain, engine), (engine, plain))],
    }
    for packed in (False, True):
        found[f"loss {packed}"] = apart(losses(plain, packed), losses(engine, packed))
        ours, theirs = gradients(plain), gradients(engine)
        found[f"names {packed}"] = sorted(ours.keys() ^ theirs.keys())
        found[f"gradients {packed}"] = {name: apart(ours[name], theirs[name]) for name in ours}
    found["trained"] = [trained(plain), trained(engine)]
    found["summed"] = [module.fuse_wgrad_accumulation for _, module in kernels.engine_modules(engine.module)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
