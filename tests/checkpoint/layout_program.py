"""A checkpoint loaded by megatron-core itself under several parallel layouts, each in as many processes as it needs.

Run as a module with a JSON file of the jobs. Every process of a layout loads its part of the model with
`dist_checkpointing.load`, compares every tensor with the slice that is its own (by rules written here by hand), and
saves with `dist_checkpointing.save`.
"""

import dataclasses
import json
import multiprocessing
import sys
import traceback
from pathlib import Path
from typing import Any

from megatron_r1.compat import megatron_cpu

megatron_cpu.enable()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset  # noqa: E402

from megatron_r1.compat.checkpoint_pickles import refuse_foreign_pickles  # noqa: E402
from megatron_r1.compat.megatron_checkpoint import keep_results_in_process  # noqa: E402
from megatron_r1.compat.megatron_specs import name_in_rules  # noqa: E402
from megatron_r1.config.sections import ModelSection, ParallelSection  # noqa: E402
from megatron_r1.model.hf_folder import read_config  # noqa: E402
from megatron_r1.model.layers import with_replacements  # noqa: E402
from megatron_r1.model.mapping import weights  # noqa: E402
from megatron_r1.model.parallel import initialize  # noqa: E402
from megatron_r1.model.rotary import rotary_arguments  # noqa: E402
from megatron_r1.model.sharding import layout as layout_of  # noqa: E402
from megatron_r1.registry import resolve  # noqa: E402

COLUMN = ("linear_qkv", "linear_q_proj", "linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj",
          "linear_kv_up_proj", "word_embeddings", "output_layer", "eh_proj")  # fmt: skip
"""Layers whose rows are dealt to the tensor-parallel ranks; of `ROW` layers it is the columns."""
ROW = ("linear_proj", "linear_fc2")
DONE = "done"
"""What is put into the output of a job that has succeeded."""


def chunk(folder: Path, layout: dict[str, int], stage: int | None) -> GPTModel:
    """One pipeline stage of the model (one of its virtual stages)."""
    hf = read_config(folder)
    family = resolve("family", hf["architectures"][0])
    section = ModelSection(path=folder, load_weights=False, dtype="float32", mtp_loss_coef=0.1)
    config = dataclasses.replace(
        family.transformer_config(hf, section),
        tensor_model_parallel_size=layout["tp"],
        sequence_parallel=layout["tp"] > 1,
        pipeline_model_parallel_size=layout["pp"],
        virtual_pipeline_model_parallel_size=layout["vpp"] if layout["vpp"] > 1 else None,
        expert_model_parallel_size=layout["ep"],
        expert_tensor_parallel_size=layout["etp"],
    )
    options: dict[str, Any] = {"use_transformer_engine": False, "normalization": config.normalization}
    mtp = None
    if config.mtp_num_layers:
        last = get_gpt_decoder_layer_specs(config, **options)[-1]
        mtp = get_gpt_mtp_block_spec(config, last, use_transformer_engine=False, vp_stage=stage)
    return GPTModel(
        config=config,
        transformer_layer_spec=with_replacements(get_gpt_decoder_block_spec(config, **options, vp_stage=stage)),
        mtp_block_spec=with_replacements(mtp),
        vocab_size=hf["vocab_size"],
        max_sequence_length=64,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        share_embeddings_and_output_weights=hf.get("tie_word_embeddings", False),
        vp_stage=stage,
        **({"position_embedding_type": "none"} if config.multi_latent_attention else rotary_arguments(hf)),
    )


def global_name(name: str, model: GPTModel, stage: int | None) -> str:
    """What a tensor of this rank is called in the whole model."""
    parts = name_in_rules(name).split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(int(parts[2]) + get_transformer_layer_offset(model.config, vp_stage=stage))
    if "local_experts" in parts:
        at = parts.index("local_experts") + 1
        local = model.config.num_moe_experts // model.config.expert_model_parallel_size
        parts[at] = str(int(parts[at]) + local * parallel_state.get_expert_model_parallel_rank())
    return ".".join(parts)


def own_slice(name: str, whole: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this rank holds."""
    if ".local_experts." in name:
        rank = parallel_state.get_expert_tensor_parallel_rank()
        size = parallel_state.get_expert_tensor_parallel_world_size()
    else:
        rank = parallel_state.get_tensor_model_parallel_rank()
        size = parallel_state.get_tensor_model_parallel_world_size()
    layer = name.split(".")[-2]
    if layer == "linear_fc1":
        gate, up = whole.chunk(2)
        return torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])
    if layer in COLUMN:
        return whole.chunk(size)[rank]
    return whole.chunk(size, dim=1)[rank] if layer in ROW else whole


def refuses(hf: dict[str, Any]) -> bool:
    """Whether a layout is refused where it would be that of this rank only."""
    try:
        layout_of(hf)
    except RuntimeError as error:
        return "processes share a model" in str(error)
    return False


def work(rank: int, world: int, layout: dict[str, int], job: dict[str, Any], meeting: str) -> None:
    """One process of a layout."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout["tp"],
        pipeline_model_parallel_size=layout["pp"],
        virtual_pipeline_model_parallel_size=layout["vpp"] if layout["vpp"] > 1 else None,
        expert_model_parallel_size=layout["ep"],
        expert_tensor_parallel_size=layout["etp"],
        create_gloo_process_groups=False,
    )
    initialize(ParallelSection(), 1)
    assert refuses(read_config(Path(job["config"])))
    stages = list(range(layout["vpp"])) if layout["vpp"] > 1 else [None]
    models = {f"model{stage or 0}": (chunk(Path(job["config"]), layout, stage), stage) for stage in stages}
    metadata = job["style"] | {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state = {key: model.sharded_state_dict(prefix="", metadata=metadata) for key, (model, _) in models.items()}
    reference = torch.load(job["reference"], weights_only=True)
    loaded = dist_checkpointing.load(state, job["checkpoint"], strict="raise_all")
    for key, (model, _) in models.items():
        model.load_state_dict(loaded[key])
    for model, stage in models.values():
        for name, tensor in weights(model).items():
            wanted = own_slice(name, reference[global_name(name, model, stage)])
            assert torch.equal(tensor, wanted), name
    state = {key: model.sharded_state_dict(prefix="", metadata=metadata) for key, (model, _) in models.items()}
    dist_checkpointing.save(state, job["output"])
    dist.barrier()


def guarded(*arguments: Any) -> None:
    """`work`, whose error ends the process at once: others wait for this one."""
    try:
        with torch.no_grad():
            work(*arguments)
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None


def run(job: dict[str, Any], meeting: Path) -> None:
    """One job, its processes forked, so that Megatron is imported once."""
    layout = {"tp": 1, "pp": 1, "vpp": 1, "ep": 1, "etp": 1} | job["layout"]
    world, context = job["processes"], multiprocessing.get_context("fork")
    arguments = (world, layout, job, str(meeting))
    ranks = [context.Process(target=guarded, args=(rank, *arguments)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        if process.exitcode != 0:
            for other in ranks:
                other.kill()
            raise ChildProcessError(
                f"{job['checkpoint']} under {job['layout']}: a process ended with {process.exitcode}"
            )


def main(jobs: Path) -> None:
    """All jobs, one after another; a job's output is marked where it has succeeded."""
    keep_results_in_process()
    refuse_foreign_pickles()
    for number, job in enumerate(json.loads(jobs.read_text())):
        try:
            run(job, jobs.with_name(f"meeting_{number}"))
        except ChildProcessError as error:
            print(error, file=sys.stderr)
        else:
            (Path(job["output"]) / DONE).touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
