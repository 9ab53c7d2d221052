"""Python's own standard library as documents: `python examples/python_library/documents.py OUTPUT`.

It is on every machine that has Python, so nothing is downloaded: the sources of the modules with their docstrings, and
what `help()` says about the language, both under the PSF License Agreement, which lets anyone copy them.
Writes `train.jsonl`, `validation.jsonl` and `summary.json`, the same for the same release of Python.

Tests and character tables are left out; most distributions do not install the former. Indentation is written as tabs,
one token for each level.
"""

import argparse
import hashlib
import platform
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics  # type: ignore[import-untyped]
from typing import Any

from megatron_r1.data.files import write_json, write_lines

LIBRARY = Path(sysconfig.get_path("stdlib"))
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "encodings", "pydoc_data"}
GENERATED = "_sysconfigdata*"
"""How this Python was built: other on each machine."""
VALIDATION = 0.04
"""Share of the documents."""


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description="Python's standard library as documents")
    parser.add_argument("output", type=Path, help="folder to write")
    output = parser.parse_args().output
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    for name, text in [*modules(LIBRARY), *language()]:
        parts["validation" if held_out(name) else "train"].append({"text": text, "name": name})
    for part, rows in parts.items():
        write_lines(output / f"{part}.jsonl", rows)
    summary = {
        "source": f"the standard library of Python {platform.python_version()}",
        "licence": "PSF-2.0",
        **{f"{part}_documents": len(rows) for part, rows in parts.items()},
        **{f"{part}_bytes": sum(len(row["text"].encode()) for row in rows) for part, rows in parts.items()},
    }
    write_json(output / "summary.json", summary)
    print(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in summary.items()))


def modules(library: Path) -> Iterator[tuple[str, str]]:
    """Name and source of each module that is not empty, in the order of names."""
    for file in sorted(library.rglob("*.py")):
        name = file.relative_to(library)
        if LEFT_OUT.isdisjoint(name.parts) and not name.match(GENERATED):
            with tokenize.open(file) as source:  # in the encoding that it declares
                text = source.read()
            if text.strip():
                yield name.as_posix(), tabbed(text)


def language() -> Iterator[tuple[str, str]]:
    """Name and text of each topic of `help()`: a chapter of the language's reference."""
    for name, text in sorted(topics.items()):
        yield f"help/{name}", text


def tabbed(text: str) -> str:
    """With a tab for each four spaces at the start of a line."""
    return re.sub("^(?: {4})+", lambda indent: "\t" * (len(indent[0]) // 4), text, flags=re.MULTILINE)


def held_out(name: str) -> bool:
    """Whether a document is for validation: by its name, so that another release parts them alike."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8]) < VALIDATION * 2**64


if __name__ == "__main__":
    main()
