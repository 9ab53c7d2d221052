"""`megatron-r1 inspect`: what a checkpoint is, how large, and what is wrong with it. Reads headers only."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_r1.config.inspect import InspectConfig
from megatron_r1.convert.card import chat_template
from megatron_r1.convert.contents import Contents, Stored, foreign_quantization, read_contents
from megatron_r1.convert.parameters import count
from megatron_r1.convert.progress import gigabytes
from megatron_r1.model.fp8 import BLOCK, SCALE_SUFFIX
from megatron_r1.model.hf_folder import COMPANIONS
from megatron_r1.model.scalar_head import causal_architecture
from megatron_r1.registry import BUILT_IN
from megatron_r1.wording import counted

_FORMATS = {
    "huggingface": "Hugging Face folder",
    "config only": "Hugging Face config.json without weights",
    "megatron torch_dist": "Megatron checkpoint (torch_dist)",
    "gguf": "GGUF file",
}
SHOWN = 20
"""Lines of a long list on the console; `--json` has all of it."""


def run(config: InspectConfig) -> dict[str, Any]:
    """`inspect`, shown on standard output."""
    result = inspect(config)
    show(result)
    return result


def inspect(config: InspectConfig) -> dict[str, Any]:
    """What a checkpoint is.

    Returns:
        `path`, `format`, `architecture`, `family` (the module that supports it, None if none does), `parameters`
        (`total`, `main`, `activated`, `mtp`; None if they cannot be counted), `stored` (tensors, elements, bytes),
        `dtypes` (name -> tensors, bytes), `fp8`, `quantized_by` (another
        program; None if none has), `files` (name -> bytes), `tokenizer`, `chat_template`,
        `max_context`, `problems`, `passed` (no problems), and `tensors` if they are asked for.

    Raises:
        DataError: there is no checkpoint.
    """
    found = read_contents(config.path, config.config, config.mtp, config.check)
    hf = found.hf or {}
    dtypes: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for stored in found.stored:
        dtypes[_dtype(stored)] += 1
        sizes[_dtype(stored)] += stored.spec.nbytes
    result = {
        "path": str(config.path),
        "format": found.format,
        "architecture": hf.get("architectures", [None])[0],
        "family": BUILT_IN["family"].get(causal_architecture(hf)) if hf else None,
        "parameters": _parameters(found),
        "stored": {
            "tensors": len(found.stored),
            "elements": sum(stored.spec.nbytes // stored.spec.dtype.itemsize for stored in found.stored),
            "bytes": sum(sizes.values()),
        },
        "dtypes": {name: {"tensors": dtypes[name], "bytes": size} for name, size in sizes.most_common()},
        "fp8": None if foreign_quantization(found.hf) else _fp8(found),
        "quantized_by": foreign_quantization(found.hf),
        "files": {file.name: file.stat().st_size for file in found.files},
        "tokenizer": [name for name in COMPANIONS if "token" in name and (found.folder / name).exists()],
        "chat_template": chat_template(found.folder) is not None,
        "max_context": hf.get("max_position_embeddings"),
        "problems": found.problems,
        "passed": not found.problems,
    }
    if config.tensors:
        result["tensors"] = [
            {
                "name": stored.name,
                "dtype": _dtype(stored),
                "shape": list(stored.spec.shape),
                "bytes": stored.spec.nbytes,
                "file": stored.file,
            }
            for stored in found.stored
        ]
    return result


def show(result: dict[str, Any], console: Console | None = None) -> None:
    """The result for people, on standard output."""
    console = console or Console()
    for tensor in result.get("tensors", ()):  # not a table: rich lays all of it out before the first line
        shape = " x ".join(map(str, tensor["shape"]))
        console.print(f"{tensor['name']}  {tensor['dtype']}  {shape}  {tensor['file']}", markup=False, soft_wrap=True)
    console.print(result["path"], style="bold", markup=False, highlight=False, soft_wrap=True)
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    for label, value in _facts(result):
        facts.add_row(label, escape(value))
    console.print(facts)
    if result["dtypes"]:
        rows = [(name, f"{its['tensors']:,}", gigabytes(its["bytes"])) for name, its in result["dtypes"].items()]
        console.print()
        console.print(_table(("stored as", "tensors", "size"), rows))
    if result["files"]:
        console.print()
        console.print(_table(("file", "size"), _files(result["files"])))
    if result["problems"]:
        console.print()
    for problem in result["problems"][:SHOWN]:
        console.print(f"problem: {problem}", style="red", markup=False, highlight=False, soft_wrap=True)
    if more := len(result["problems"]) - SHOWN:
        console.print(f"and {counted(more, 'more problem')}; --json lists all", style="red") if more > 0 else None


def _parameters(found: Contents) -> dict[str, int] | None:
    if not found.sizes or found.hf is None:
        return None
    counted = count(found.sizes, found.hf)
    return {name: getattr(counted, name) for name in ("total", "main", "activated", "mtp")}


def _fp8(found: Contents) -> dict[str, Any] | None:
    """FP8 weights, their blocks and scales; None if there are none."""
    weights = [stored for stored in found.stored if "float8" in _dtype(stored)]
    if not weights:
        return None
    scales = [stored for stored in found.stored if stored.name.endswith(SCALE_SUFFIX)]
    settings = (found.hf or {}).get("quantization_config") or {}
    return {
        "weights": len(weights),
        "scales": len(scales),
        "block": list(settings.get("weight_block_size", BLOCK)),
        "scale_dtype": ", ".join(sorted({_dtype(scale) for scale in scales})),
    }


def _dtype(stored: Stored) -> str:
    return str(stored.spec.dtype).removeprefix("torch.")


def _facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [("format", _FORMATS[result["format"]])]
    if result["architecture"]:
        family = (result["family"] or "not supported").partition(":")[0].rpartition(".")[2]
        facts.append(("architecture", f"{result['architecture']} ({'family ' * bool(result['family'])}{family})"))
    if counted := result["parameters"]:
        facts.append(("parameters", f"{counted['main']:,}"))
        if counted["activated"] != counted["main"]:
            facts.append(("  active", f"{counted['activated']:,} for a token"))
        if counted["mtp"]:
            facts.append(("  in MTP", f"{counted['mtp']:,} more"))
    if result["stored"]["tensors"]:
        stored = result["stored"]
        facts.append(("stored", f"{stored['tensors']:,} tensors, {stored['bytes']:,} bytes"))
    if fp8 := result["fp8"]:
        block = " x ".join(map(str, fp8["block"]))
        facts.append(("FP8", f"{fp8['weights']:,} weights in blocks of {block}, scales in {fp8['scale_dtype']}"))
    if result["quantized_by"]:
        facts.append(("quantized", f"by {result['quantized_by']}: not converted further"))
    if not result["architecture"]:
        return facts
    facts.append(("context", f"{result['max_context']:,} tokens" if result["max_context"] else "not said"))
    facts.append(("tokenizer", ", ".join(result["tokenizer"]) or "none"))
    facts.append(("chat template", "yes" if result["chat_template"] else "none"))
    return facts


def _files(files: dict[str, int]) -> list[tuple[str, str]]:
    rows = [(name, gigabytes(size)) for name, size in files.items()]
    if len(rows) <= SHOWN:
        return rows
    rest = list(files.values())[3:-1]
    return [*rows[:3], (f"{len(rest)} more", gigabytes(sum(rest))), rows[-1]]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for number, column in enumerate(header):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*[escape(cell) for cell in row])
    return table
