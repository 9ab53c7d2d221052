"""`megatron-r1 verify`: whether two checkpoints hold the same tensors, and with text whether they say the same."""

import math
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_r1.config.inspect import VerifyConfig
from megatron_r1.convert.budget import ByteBudget
from megatron_r1.convert.comparison import (
    Difference,
    Names,
    Side,
    difference,
    digest,
    digest_of_all,
    equal,
    open_side,
    open_stored_side,
)
from megatron_r1.convert.logits import compare_logits
from megatron_r1.convert.progress import gigabytes, open_display
from megatron_r1.data.files import write_json

MEMORY = 2 << 30
"""Bytes of tensors in memory at once, unless a single pair is larger."""
LONG = 1 << 30
"""Bytes from which on the progress is shown."""
SHOWN = 20
SHOWN_NAMES = 5
"""Of those that only one has."""
SHOWN_CLOSE = 3
"""Of those that differ by less than is allowed."""


@dataclass
class _Compared:
    """What a thread found of the tensors of one rule."""

    digests_a: dict[str, str] = field(default_factory=dict)
    digests_b: dict[str, str] = field(default_factory=dict)
    differing: list[Difference] = field(default_factory=list)


def run(config: VerifyConfig) -> dict[str, Any]:
    """`verify`, shown on standard output."""
    result = verify(config)
    show(result)
    return result


def verify(config: VerifyConfig) -> dict[str, Any]:
    """Compare two checkpoints.

    Returns:
        `a` and `b` (path, architecture, tensors, bytes, `sha256` of all content), `equal` (how many), `differing`
        (see `Difference`), `only_in_a`, `only_in_b`, `problems` (what could not be compared), `config_differences`
        (key -> values in a and b), `identical`, `close` (within the tolerance), `text` (see `compare_logits`; None
        without text), `passed`: identical, or close where a tolerance is given.

    Raises:
        DataError: a checkpoint or the text cannot be read.
    """
    a, b = _sides(config)
    compared = _compare(a, b, config.workers)
    digests_a = {name: content for one in compared for name, content in one.digests_a.items()}
    digests_b = {name: content for one in compared for name, content in one.digests_b.items()}
    differing = [found for one in compared for found in one.differing]
    only_a, only_b = sorted(digests_a.keys() - digests_b.keys()), sorted(digests_b.keys() - digests_a.keys())
    problems = [f"{path}: {text}" for path, side in ((config.a, a), (config.b, b)) for text in side.problems]
    same_names = not (only_a or only_b or problems)
    identical = same_names and not differing
    near = all(one.relative_error is not None and one.relative_error <= config.tolerance for one in differing)
    result = {
        "a": _summary(config.a, a, digests_a),
        "b": _summary(config.b, b, digests_b),
        "equal": len(digests_a.keys() & digests_b.keys()) - len(differing),
        "differing": [asdict(one) for one in differing],
        "only_in_a": only_a,
        "only_in_b": only_b,
        "problems": problems,
        "config_differences": _config_differences(a, b),
        "tolerance": config.tolerance,
        "identical": identical,
        "close": same_names and near,
        "passed": same_names and near if config.tolerance else identical,
        "text": compare_logits(config, config.text) if config.text else None,
    }
    if config.output:
        write_json(config.output / "summary.json", result)
    return result


def show(result: dict[str, Any], console: Console | None = None) -> None:
    """The result for people, on standard output."""
    console = console or Console()
    for side in ("a", "b"):
        its = result[side]
        _print(console, f"{its['sha256']}  {its['path']}: {its['tensors']:,} tensors, {gigabytes(its['bytes'])}")
    _show_differences(console, result["differing"], SHOWN_CLOSE if result["passed"] else SHOWN)
    for side in ("a", "b"):
        _list(console, f"only in {result[side]['path']}", result[f"only_in_{side}"], SHOWN_NAMES)
    _list(console, "problem", result["problems"])
    keys = [f"{key} = {ours!r} and {theirs!r}" for key, (ours, theirs) in result["config_differences"].items()]
    _list(console, "config.json differs", keys)
    if text := result["text"]:
        console.print(f"logits on {text['tokens']:,} tokens of text:", highlight=False)
        console.print(f"  largest difference  {text['max_difference']:.3g}", highlight=False)
        console.print(
            f"  KL(a || b)          {text['kl_mean']:.3g} nats, at most {text['kl_max']:.3g}", highlight=False
        )
        console.print(f"  same likeliest      {100 * text['top1_agreement']:.2f} % of tokens", highlight=False)
        console.print(f"  loss                {text['loss_a']:.6f} and {text['loss_b']:.6f} nats", highlight=False)
    alone = len(result["only_in_a"]) + len(result["only_in_b"])
    verdict = f"{result['equal']:,} equal, {len(result['differing']):,} differ"
    verdict += f", {alone:,} in one of them only" if alone else ""
    if result["identical"]:
        console.print(f"identical: {verdict}", style="bold green", highlight=False)
    elif result["close"] and result["tolerance"]:
        console.print(f"close: {verdict}, all within {result['tolerance']:g}", style="bold green", highlight=False)
    else:
        console.print(
            f"not identical: {verdict}{_next_step(result)}", style="bold red", highlight=False, soft_wrap=True
        )


def _sides(config: VerifyConfig) -> tuple[Side, Side]:
    if config.stored:
        return open_stored_side(config.a), open_stored_side(config.b)
    return open_side(config.a, config.config, config.mtp), open_side(config.b, config.config, config.mtp)


def _compare(a: Side, b: Side, workers: int) -> list[_Compared]:
    """All tensors of both, several rules at a time."""
    names = list(dict.fromkeys([*a.sizes, *b.sizes]))
    sizes = [a.sizes.get(one, 0) + b.sizes.get(one, 0) for one in names]
    total, budget = sum(sizes), ByteBudget(MEMORY)
    shown = open_display(sys.stderr, "comparing", total, 0) if total >= LONG else nullcontext()

    def work(one: Names, nbytes: int) -> _Compared:
        with budget.hold(nbytes):
            found = _compare_one(a, b, one)
        if display:
            display.advance(nbytes)
        return found

    with shown as display, ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, names, sizes))


def _compare_one(a: Side, b: Side, names: Names) -> _Compared:
    found = _Compared()
    ours = dict(zip(names, a.read(names), strict=True)) if names in a.sizes else {}
    theirs = dict(zip(names, b.read(names), strict=True)) if names in b.sizes else {}
    for name in names:
        x, y = ours.pop(name, None), theirs.pop(name, None)
        same = x is not None and y is not None and equal(x, y)
        if x is not None:
            found.digests_a[name] = digest(x)
        if y is not None:
            found.digests_b[name] = found.digests_a[name] if same else digest(y)
        if x is not None and y is not None and not same:
            found.differing.append(difference(name, x, y))
    return found


def _summary(path: Path, side: Side, digests: dict[str, str]) -> dict[str, Any]:
    return {
        "path": str(path),
        "architecture": side.hf["architectures"][0],
        "tensors": len(digests),
        "bytes": sum(side.sizes.values()),
        "sha256": digest_of_all(digests.items()),
    }


def _config_differences(a: Side, b: Side) -> dict[str, list[Any]]:
    """Keys of config.json with another value, or (None) in one only."""
    keys = sorted(a.hf.keys() | b.hf.keys())
    return {key: [a.hf.get(key), b.hf.get(key)] for key in keys if a.hf.get(key) != b.hf.get(key)}


def _show_differences(console: Console, differing: Sequence[dict[str, Any]], shown: int) -> None:
    """Those that lie furthest apart first."""
    worst = sorted(differing, key=lambda one: -(math.inf if one["relative_error"] is None else one["relative_error"]))
    for one in worst[:shown]:
        dtypes = " and ".join(dict.fromkeys(one["dtypes"]))
        if one["shapes"][0] != one["shapes"][1]:
            apart = "shapes {} and {}".format(*one["shapes"])
        elif one["relative_error"] is None:
            apart = "not comparable: zero, infinite or not a number"
        else:
            apart = f"relative error {one['relative_error']:.3g}, largest difference {one['max_difference']:.3g}"
        _print(console, f"differs: {one['name']} ({dtypes}): {apart}")
    if more := len(worst[shown:]):
        _print(console, f"differs: {more:,} more; --json lists all")


def _next_step(result: dict[str, Any]) -> str:
    """What accepts a difference that is of rounding only."""
    errors = [one["relative_error"] for one in result["differing"]]
    if result["only_in_a"] or result["only_in_b"] or result["problems"] or not errors or None in errors:
        return ""
    return f", the worst by a relative error of {max(errors):.3g}; --tolerance allows for rounding"


def _list(console: Console, label: str, lines: Sequence[str], shown: int = SHOWN) -> None:
    for line in lines[:shown]:
        _print(console, f"{label}: {line}")
    if more := len(lines[shown:]):
        _print(console, f"{label}: {more:,} more; --json lists all")


def _print(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
