"""`megatron-r1 <verb> run.toml [--section.key=value ...] [--dry-run] [--json]`.

Each verb names its config class and the function that runs it; both are imported only when the verb is
used, so `--help` stays instant.
"""

import argparse
import importlib
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_r1 import __version__
from megatron_r1.errors import UserError
from megatron_r1.launch import end_with_launcher, relaunch

FIRST_RANK_SECONDS = 30.0
"""Longest that the other ranks wait for the first to report an error."""


@dataclass(frozen=True)
class Verb:
    """One command: its config class and its entry point, both as `module:Name`."""

    help: str
    config: str
    run: str


VERBS = {
    "data filter": Verb(
        "keep the questions that a model solves sometimes; length, duplicates",
        "megatron_r1.config.evaluation:FilterConfig",
        "megatron_r1.evaluate.filter:run",
    ),
    "data generate": Verb(
        "worked solutions of generated tasks, as text documents",
        "megatron_r1.config.runs:GenerateConfig",
        "megatron_r1.data.corpus:generate",
    ),
    "data decontaminate": Verb(
        "drop rows that share word n-grams with evaluation sets",
        "megatron_r1.data.decontaminate:DecontaminateConfig",
        "megatron_r1.data.decontaminate:run",
    ),
    "data index": Verb(
        "documents to Megatron indexed datasets",
        "megatron_r1.config.runs:IndexConfig",
        "megatron_r1.data.indexed:build",
    ),
    "tokenizer train": Verb(
        "a sentencepiece tokenizer that transformers and vLLM load",
        "megatron_r1.config.runs:TokenizerConfig",
        "megatron_r1.data.tokenizer:train",
    ),
    "pretrain": Verb(
        "train a model on indexed datasets",
        "megatron_r1.config.runs:PretrainConfig",
        "megatron_r1.train.pretrain:run",
    ),
    "rl": Verb(
        "reinforcement learning with verifiable rewards (GRPO)",
        "megatron_r1.config.runs:RLConfig",
        "megatron_r1.train.rl:run",
    ),
    "evaluate": Verb(
        "pass@1, pass@k and majority vote of a model on tasks",
        "megatron_r1.config.evaluation:EvaluateConfig",
        "megatron_r1.evaluate.benchmark:run",
    ),
    "sandbox serve": Verb(
        "run programs for code rewards on other machines",
        "megatron_r1.config.sandbox:SandboxServeConfig",
        "megatron_r1.reward.sandbox.service:serve",
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0 done, 1 the run failed, 2 bad input, 130/143 interrupted."""
    parser = _parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    options, overrides = parser.parse_known_args(arguments)
    verb = VERBS[options.verb]
    rank = int(os.environ.get("RANK", "0"))
    signal.signal(signal.SIGTERM, _terminate)
    end_with_launcher()
    try:
        return _run(verb, options, overrides, arguments)
    except UserError as error:
        if rank:
            # Most errors are raised on every rank. The first reports them, when it has stopped its engines, and its
            # end ends this one; only what the first rank does not see is reported here.
            time.sleep(FIRST_RANK_SECONDS)
        print(f"megatron-r1 {options.verb}{f' (rank {rank})' if rank else ''}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except (KeyboardInterrupt, SystemExit) as stop:
        if not rank:
            print(
                f"megatron-r1 {options.verb}: interrupted; the same command goes on from the last checkpoint, if any",
                file=sys.stderr,
            )
        return int(stop.code or 0) if isinstance(stop, SystemExit) else 130


def _run(verb: Verb, options: argparse.Namespace, overrides: list[str], arguments: list[str]) -> int:
    from megatron_r1.config.load import dump, load

    config = load(options.config, overrides, _import(verb.config))
    if options.dry_run:
        print(dump(config), end="")
        return 0
    parallel = getattr(config, "parallel", None)
    if parallel is not None and parallel.processes > 1 and "RANK" not in os.environ:
        return relaunch(parallel.processes, arguments)
    summary: dict[str, Any] = _import(verb.run)(config)
    if os.environ.get("RANK", "0") == "0":
        if hasattr(config, "output"):  # a server writes nothing
            config.output.mkdir(parents=True, exist_ok=True)
            (config.output / "config.toml").write_text(dump(config))
        if options.json:
            print(json.dumps(summary))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-r1",
        description="Take a base model, teach it to reason by reinforcement learning, ship the result.",
        epilog="Any key of the run file can be overridden: --optim.lr=1e-4 --rollout.temperature=0.7",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"megatron-r1 {__version__}")
    groups: dict[str, Any] = {"": parser.add_subparsers(metavar="VERB", required=True)}
    for name, verb in VERBS.items():
        family, _, action = name.rpartition(" ")
        if family not in groups:
            actions = ", ".join(other.removeprefix(f"{family} ") for other in VERBS if other.startswith(f"{family} "))
            shared = groups[""].add_parser(family, help=actions, allow_abbrev=False)
            groups[family] = shared.add_subparsers(metavar="ACTION", required=True)
        command = groups[family].add_parser(action, help=verb.help, description=verb.help, allow_abbrev=False)
        command.add_argument("config", type=Path, metavar="run.toml")
        command.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")
        command.add_argument("--json", action="store_true", help="print the run's figures as JSON at the end")
        command.set_defaults(verb=name)
    return parser


def _import(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _terminate(signum: int, frame: FrameType | None) -> None:
    """SIGTERM unwinds like an error, so that every `with` closes what it opened."""
    sys.exit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
