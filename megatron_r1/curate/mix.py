"""Candidates of all sources -> rows: without what evaluation sets hold, in the wanted shares, shuffled."""

import random
from collections.abc import Sequence
from typing import Any

from megatron_r1.config.collect import CollectConfig
from megatron_r1.config.load import validate
from megatron_r1.curate.candidates import Candidate, Ledger
from megatron_r1.data import decontaminate
from megatron_r1.data.files import write_lines
from megatron_r1.data.sieve import DROPPED
from megatron_r1.data.tables import JsonLines
from megatron_r1.seeds import stream_seed


def uncontaminated(config: CollectConfig, candidates: Sequence[Candidate], ledger: Ledger) -> list[Candidate]:
    """Those that share no words with evaluation sets; the others are dropped, with what they share.

    Raises:
        DataError: an evaluation set that cannot be read.
    """
    if config.decontaminate is None or not candidates:
        return list(candidates)
    folder = config.output / "decontaminated"
    texts = (
        {"number": number, "question": one.question.metadata["text"], "response": "\n".join(one.spoken())}
        for number, one in enumerate(candidates)
    )
    write_lines(folder / "rows.jsonl", texts)
    tree = config.decontaminate.model_dump(exclude_none=True)
    tree |= {"output": str(folder), "data": {"source": str(folder / "rows.jsonl")}}
    decontaminate.separate(validate(decontaminate.DecontaminateConfig, tree, where="[decontaminate]"))
    table = JsonLines(folder / DROPPED)
    overlaps = {row["row"]["number"]: row["overlap"] for row in map(table.row, range(len(table)))}
    for number, overlap in overlaps.items():
        ledger.drop(candidates[number], "contaminated", overlap)
    return [one for number, one in enumerate(candidates) if number not in overlaps]


def mixed(config: CollectConfig, candidates: Sequence[Candidate], ledger: Ledger) -> list[Candidate]:
    """At most `limit` of each source, or their shares of the largest mix that has them; the seed draws and shuffles."""
    by_source: dict[str, list[Candidate]] = {name: [] for name in config.sources}
    for one in candidates:
        by_source[one.source].append(one)
    sizes = quotas(config, {name: len(found) for name, found in by_source.items()})
    rows: list[Candidate] = []
    for name, found in by_source.items():
        random.Random(stream_seed("mix", config.seed, name)).shuffle(found)
        rows += found[: sizes[name]]
        for one in found[sizes[name] :]:
            ledger.drop(one, "beyond limit or share")
    random.Random(stream_seed("mix", config.seed)).shuffle(rows)
    return rows


def quotas(config: CollectConfig, available: dict[str, int]) -> dict[str, int]:
    """How many rows each source gives."""
    limited = {name: min(count, config.sources[name].limit or count) for name, count in available.items()}
    shares = {name: source.share for name, source in config.sources.items() if source.share is not None}
    if not shares:
        return limited
    total = min(limited[name] / share for name, share in shares.items())  # in units of one share
    return {name: round(total * share) for name, share in shares.items()}


def rows(candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Candidates as rows of `chats.jsonl`."""
    return [one.row() for one in candidates]
