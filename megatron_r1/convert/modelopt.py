"""`quantize`: a Hugging Face folder -> NVIDIA's unified format (`hf_quant_config.json`), by nvidia-modelopt.

The whole model stands in memory, on the GPU where there is one, in bfloat16: unlike the other conversions this one has
to run it. Linear layers are quantised, but for the head and the routers; MTP layers, which transformers does not build,
stay in bfloat16. Before it is written the rounded model can be trained (`modelopt_finetune.py`).
"""

import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_r1.checkpoint.source import HuggingFaceSource, open_source
from megatron_r1.config.modelopt import QuantizeConfig
from megatron_r1.convert.card import CARD
from megatron_r1.convert.modelopt_finetune import finetune, mean_loss
from megatron_r1.convert.plan import check
from megatron_r1.convert.progress import gigabytes
from megatron_r1.convert.verbs import card_text, check_paths
from megatron_r1.data.files import documents, write_json
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.model.family import Rule
from megatron_r1.model.hf_folder import TensorReader, copy_companions, read_config
from megatron_r1.model.safetensors_file import read_header
from megatron_r1.report.catalogue import duration
from megatron_r1.report.summary import write_summary

INSTALL = "requirements/install.sh .venv requirements/modelopt.lock"
RECIPES = {
    "fp8": "FP8_DEFAULT_CFG",
    "fp8_block": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "nvfp4": "NVFP4_DEFAULT_CFG",
    "int4_awq": "INT4_AWQ_CFG",
}
"""modelopt's names."""
_WEIGHTS_ONLY = {"fp8_block"}
_QUANTIZATION = "quantization_config"


def run_quantize(config: QuantizeConfig) -> dict[str, Any]:
    """Quantise, write aside, rename.

    Raises:
        ConfigError: nvidia-modelopt is not installed, no calibration text, or the output exists.
        DataError: the source is quantised already or damaged, or modelopt cannot put it into this format.
    """
    output = config.output / config.folder
    check_paths(config)
    if importlib.util.find_spec("modelopt") is None:
        raise ConfigError(f"the package nvidia-modelopt, which quantises, is not installed: {INSTALL}")
    source = open_source(config.source)
    if not isinstance(source, HuggingFaceSource):
        raise ConfigError(f"{config.source} is not a Hugging Face folder; megatron-r1 export makes one")
    if source.hf.get(_QUANTIZATION):
        raise DataError(f"{config.source} is quantised already: megatron-r1 cast makes a bfloat16 folder of it")
    check(source, any_dtype=True)
    described = {_QUANTIZATION: {"quant_method": "modelopt", "fmt": config.format}}
    text = card_text("quantize", config, config.source, source.hf | described)
    texts = Texts.read(config)
    begin = time.monotonic()
    dtype = torch.float32 if config.finetune else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(config.source, dtype=dtype, local_files_only=True)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    aside = output.with_name(f"{output.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        losses = export(model, config, texts, aside)
        key = "dtype" if "dtype" in source.hf else "torch_dtype"  # the older name of the same key
        written = {**source.hf, key: "bfloat16", _QUANTIZATION: read_config(aside)[_QUANTIZATION]}
        write_json(aside / "config.json", written)
        copy_companions(aside, [config.source])
        (aside / CARD).write_text(text, encoding="utf-8")
        seconds = round(time.monotonic() - begin, 3)
        figures: dict[str, Any] = count(aside, source.rules) | {
            "output": str(output),
            "format": config.format,
            "calibration_tokens": sum(map(len, texts.calibration)),
            "seconds": seconds,
            **losses,
        }
        if output.exists():
            output.rmdir()  # empty, or `check_free` would have said so
        os.replace(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    size = gigabytes(figures["bytes"])
    print(f"wrote {output}: {figures['tensors']:,} tensors, {size} in {duration(figures['seconds'])}")
    return write_summary(config.output, figures)


@dataclass
class Texts:
    """Token ids, a list each document."""

    calibration: list[list[int]]
    finetune: list[list[int]]
    heldout: list[list[int]]

    @classmethod
    def read(cls, config: QuantizeConfig) -> "Texts":
        """What the run file names.

        Raises:
            ConfigError: the format needs text to calibrate with, or a file has none.
        """
        needed = config.format not in _WEIGHTS_ONLY
        if needed and config.calibration is None:
            raise ConfigError(
                f"format {config.format!r} measures activations: name a JSONL file of text with --calibration"
            )
        tokenizer = Tokenizer.load(config.source)

        def ids(path: Path | None, shortest: int, count: int | None = None) -> list[list[int]]:
            if path is None:
                return []
            whole = tokenizer.encode_documents(list(islice(documents(path), count)))
            found = [text[: config.length] for text in whole if min(len(text), config.length) >= shortest]
            if not found:
                raise ConfigError(f"{path} holds no text of {shortest} tokens")
            return found

        calibration = ids(config.calibration, 1, config.samples) if needed else []
        return cls(calibration, finetune=ids(config.finetune, 2), heldout=ids(config.heldout, 2))


def export(model: PreTrainedModel, config: QuantizeConfig, texts: Texts, folder: Path) -> dict[str, float]:
    """Quantise `model` in place, train it where there is text for it, and write it in the unified format, without
    tokenizer.

    Returns:
        Losses of the held-out text and of the training, nats a token.

    Raises:
        DataError: modelopt cannot put this model into this format.
    """
    from modelopt.torch import quantization
    from modelopt.torch.export import export_hf_checkpoint

    def calibrate(quantised: Callable[..., Any]) -> None:
        for ids in texts.calibration:
            quantised(torch.tensor([ids], device=model.device))

    figures: dict[str, float] = {}

    def measure(name: str) -> None:
        if texts.heldout:
            figures[f"heldout_loss_{name}"] = mean_loss(model, texts.heldout)

    extra = mtp_tensors(config.source, model)
    measure("source")
    try:
        with torch.no_grad():
            recipe = getattr(quantization, RECIPES[config.format])
            quantised = quantization.quantize(model, recipe, calibrate if texts.calibration else None)
        measure("quantised")
        if texts.finetune:
            losses = finetune(model, config, texts.finetune)
            figures |= {"finetune_loss_first": losses[0], "finetune_loss_last": losses[-1]}
            measure("finetuned")
        with torch.no_grad():
            export_hf_checkpoint(quantised, dtype=torch.bfloat16, export_dir=folder, extra_state_dict=extra)
    except (AssertionError, NotImplementedError) as error:  # modelopt's own checks of shapes and devices
        raise DataError(f"modelopt cannot put {config.source} into {config.format}: {error}") from error
    return figures


def mtp_tensors(source: Path, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Tensors of the MTP layers, and a note for modelopt that they are not quantised."""
    first, count = model.config.num_hidden_layers, getattr(model.config, "num_nextn_predict_layers", None) or 0
    layers = [f"model.layers.{first + index}" for index in range(count)]
    model._mtp_layer_prefixes = layers  # where modelopt's exporter looks for them
    reader = TensorReader(source)
    return {name: reader[name].bfloat16() for name in reader if name.startswith(tuple(f"{each}." for each in layers))}


def count(folder: Path, rules: Sequence[Rule]) -> dict[str, int]:
    """Figures of what was written.

    Raises:
        DataError: a tensor of the model is missing.
    """
    entries = {name: entry for file in folder.glob("*.safetensors") for name, entry in read_header(file).items()}
    lost = [name for rule in rules for name in rule.hf if name not in entries]
    if lost:
        raise DataError(f"modelopt wrote {len(lost)} tensors of the model not at all, for example {lost[0]}")
    recorded = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    size = sum(entry.nbytes for entry in entries.values())
    return {"tensors": len(entries), "bytes": size, "excluded_modules": len(recorded["exclude_modules"])}
