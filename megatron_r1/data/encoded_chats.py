"""Examples as token ids in a folder: encoded once, read by every rank and by a resumed run from mapped memory."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.config.sft import ChatsSection
from megatron_r1.data.chats import Audit, Chats, Example
from megatron_r1.data.files import write_json
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError
from megatron_r1.seeds import stream_seed

_RANGE = 1 << 63
"""`stream_seed` is below it."""


class EncodedChats:
    """The examples in a folder that `encode` wrote, by number."""

    def __init__(self, folder: Path) -> None:
        about = json.loads((folder / "about.json").read_text())
        columns = np.load(folder / "columns.npz")
        self._tokens = np.memmap(folder / "tokens.bin", np.int32, mode="r")
        self._cuts, self._prompts = columns["cuts"], columns["prompts"]
        self._sources, self._domains, self._keys = columns["sources"], columns["domains"], columns["keys"]
        self._names: list[str] = about["domains"]
        self.digest: int = about["digest"]
        """Of all token ids and their order."""
        self.audit = Audit(**about["audit"])

    def __len__(self) -> int:
        return len(self._prompts)

    def tokens(self, number: int) -> list[int]:
        """Prompt, then response. [prompt + response]"""
        ids: list[int] = self._tokens[self._cuts[number] : self._cuts[number + 1]].tolist()
        return ids

    def response_length(self, number: int) -> int:
        """Tokens that are trained on: the response's and the end-of-sequence token."""
        return int(self._cuts[number + 1] - self._cuts[number] - self._prompts[number])

    def part(self, heldout: float, chosen: bool, sources: int) -> list[list[int]]:
        """Numbers of the examples of each of `sources` sources whose prompt is (not) in the held-out share."""
        inside = self._keys < heldout * _RANGE
        return [np.flatnonzero((self._sources == source) & (inside == chosen)).tolist() for source in range(sources)]

    def table(self, numbers: Sequence[int]) -> dict[str, dict[str, float]]:
        """Rows and mean tokens of some examples by domain, as in table 5 of DeepSeek-R1 (arXiv 2501.12948v2)."""
        lengths, rows = np.diff(self._cuts), np.asarray(numbers, dtype=np.int64)
        table = {}
        for number, name in enumerate(self._names):
            own = rows[self._domains[rows] == number]
            if len(own):
                mean, prompt = float(lengths[own].mean()), float(self._prompts[own].mean())
                table[name] = {"rows": len(own), "mean_tokens": mean, "mean_response_tokens": mean - prompt}
        return table


def encode(sources: Sequence[ChatsSection], tokenizer: Tokenizer, folder: Path, max_length: int, strict: bool) -> None:
    """Read, audit and encode `sources` into `folder`, unless that holds them already.

    Args:
        sources: read one after another.
        tokenizer: of the model that is trained.
        folder: written aside, then renamed.
        max_length: tokens of the longest example that is kept.
        strict: refuse bad rows instead of leaving them out.

    Raises:
        DataError: what `Chats` raises; bad rows when `strict`; no row that can be trained on.
    """
    identity = _identity(sources, tokenizer, max_length, strict)
    about = folder / "about.json"
    if about.exists() and json.loads(about.read_text())["identity"] == identity:
        return
    partial = folder.with_name(folder.name + ".partial")
    for left in (partial, folder):  # by a run that was killed, or of other data
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        chats = Chats(tokenizer, max_length)
        numbered = ((number, example) for number, source in enumerate(sources) for example in chats.read(source))
        found = _write(partial, numbered)
        _refuse(chats.audit, strict, kept=found.pop("examples"), max_length=max_length)
        write_json(partial / "about.json", {"identity": identity, "audit": asdict(chats.audit), **found})
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(folder: Path, examples: Iterable[tuple[int, Example]]) -> dict[str, Any]:
    columns: dict[str, list[int]] = {"cuts": [0], "prompts": [], "sources": [], "domains": [], "keys": []}
    domains: dict[str, int] = {}
    digest = hashlib.blake2b(digest_size=8)
    with (folder / "tokens.bin").open("wb") as out:
        for source, example in examples:
            ids = np.array(example.prompt + example.response, np.int32)
            out.write(ids.tobytes())
            digest.update(np.array([source, len(ids), len(example.prompt)], np.int64).tobytes() + ids.tobytes())
            columns["cuts"].append(columns["cuts"][-1] + len(ids))
            columns["prompts"].append(len(example.prompt))
            columns["sources"].append(source)
            columns["domains"].append(domains.setdefault(example.domain, len(domains)))
            columns["keys"].append(stream_seed("heldout prompt", *example.prompt))
    np.savez(folder / "columns.npz", **{name: np.array(values, np.int64) for name, values in columns.items()})
    number = int.from_bytes(digest.digest(), "big") >> 1
    return {"examples": len(columns["prompts"]), "domains": list(domains), "digest": number}


def _refuse(audit: Audit, strict: bool, kept: int, max_length: int) -> None:
    if strict and audit.bad:
        raise DataError(
            f"{audit.bad:,} of {audit.examples:,} rows should not be learned from: {'; '.join(audit.shown)}"
            f'{" ..." if audit.bad > len(audit.shown) else ""}. Mend them, or leave them out by bad_rows = "drop"'
        )
    if not kept:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in audit.problems.items())
        raise DataError(f"no row is left to train on: of {audit.examples:,}, {reasons} (max_length is {max_length:,})")


def _identity(sources: Sequence[ChatsSection], tokenizer: Tokenizer, max_length: int, strict: bool) -> str:
    """Changes when anything changes that the encoded examples come from."""
    files = [path for source in sources for path in _files(Path(source.path).expanduser())]
    files += [tokenizer.path / name for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")]
    stats = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
    return json.dumps([[source.model_dump() for source in sources], stats, max_length, strict])


def _files(path: Path) -> Iterator[Path]:
    yield from sorted(path.rglob("*")) if path.is_dir() else [path]
