"""The modules of examples/r1_tiny, loaded as run files load them."""

import sys
from pathlib import Path

from megatron_r1.registry import resolve

FOLDER = Path(__file__).parents[2] / "examples/r1_tiny"
WORLD = FOLDER / "world.py"
DOCUMENTS = FOLDER / "documents.py"

world = sys.modules[resolve("task", f"{WORLD}:General").__module__]
documents = sys.modules[resolve("source", f"{DOCUMENTS}:Talk").__module__]
judge = sys.modules[resolve("task", f"{FOLDER / 'judge.py'}:Judge").__module__]
