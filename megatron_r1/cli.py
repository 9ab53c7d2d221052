"""`megatron-r1 <verb> run.toml [--section.key=value ...] [--dry-run] [--json]`, `run recipe.toml`, `status DIR`, and
commands on checkpoints: `import SOURCE OUTPUT`, `verify A B`, ...

Each verb names its config class and the function that runs it; both are imported only when the verb is
used, so `--help` stays instant.
"""

import argparse
import errno
import importlib
import json
import os
import signal
import sys
import time
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_r1 import __version__
from megatron_r1.errors import ConfigError, UserError
from megatron_r1.launch import end_with_launcher, nodes, relaunch

FIRST_RANK_SECONDS = 30.0
"""Longest that the other ranks wait for the first to report an error."""


@dataclass(frozen=True)
class Verb:
    """One command: its config class and its entry point, both as `module:Name`."""

    help: str
    config: str
    run: str
    final: str = "summary.json"
    """The file below its output folder that says that it has finished."""


VERBS = {
    "data filter": Verb(
        "keep the questions that a model solves sometimes; length, duplicates",
        "megatron_r1.config.evaluation:FilterConfig",
        "megatron_r1.evaluate.filter:run",
    ),
    "data generate": Verb(
        "worked solutions of generated tasks, as text documents",
        "megatron_r1.config.generate:GenerateConfig",
        "megatron_r1.data.corpus:generate",
    ),
    "data decontaminate": Verb(
        "drop rows that share word n-grams with evaluation sets",
        "megatron_r1.data.decontaminate:DecontaminateConfig",
        "megatron_r1.data.decontaminate:run",
    ),
    "data index": Verb(
        "documents to Megatron indexed datasets",
        "megatron_r1.config.corpus:IndexConfig",
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
    "sft": Verb(
        "supervised fine-tuning on prompts and responses",
        "megatron_r1.config.sft:SFTConfig",
        "megatron_r1.train.sft:run",
    ),
    "collect": Verb(
        "sample, judge, filter and rewrite responses into a data set for sft (cold start, rejection sampling)",
        "megatron_r1.config.collect:CollectConfig",
        "megatron_r1.curate.collect:run",
    ),
    "preferences": Verb(
        "have a judge compare or label responses, for reward models and dpo",
        "megatron_r1.config.preferences:PreferencesConfig",
        "megatron_r1.curate.preferences:run",
    ),
    "reward-model": Verb(
        "train a reward model on preference pairs or labels",
        "megatron_r1.config.reward_model:RewardModelConfig",
        "megatron_r1.train.reward_model:run",
    ),
    "dpo": Verb(
        "direct preference optimisation on preference pairs",
        "megatron_r1.config.dpo:DPOConfig",
        "megatron_r1.train.dpo:run",
    ),
    "evaluate": Verb(
        "pass@1, pass@k and majority vote of a model on tasks",
        "megatron_r1.config.evaluation:EvaluateConfig",
        "megatron_r1.evaluate.benchmark:run",
        final="results.json",
    ),
    "lm-eval": Verb(
        "tasks of EleutherAI's lm-evaluation-harness on a model behind vLLM",
        "megatron_r1.config.lm_eval:LmEvalConfig",
        "megatron_r1.evaluate.lm_eval:run",
        final="results.json",
    ),
    "sandbox serve": Verb(
        "run programs for code rewards on other machines",
        "megatron_r1.config.sandbox:SandboxServeConfig",
        "megatron_r1.reward.sandbox.service:serve",
    ),
}

CHECKPOINT_VERBS = {
    "import": Verb(
        "Hugging Face folder or GGUF file to a Megatron checkpoint",
        "megatron_r1.config.convert:ImportConfig",
        "megatron_r1.convert.verbs:run_import",
    ),
    "export": Verb(
        "Megatron checkpoint to a Hugging Face folder",
        "megatron_r1.config.convert:ExportConfig",
        "megatron_r1.convert.verbs:run_export",
    ),
    "cast": Verb(
        "Hugging Face folder or GGUF file to a Hugging Face folder in another dtype; to and from FP8 in blocks",
        "megatron_r1.config.convert:CastConfig",
        "megatron_r1.convert.verbs:run_cast",
    ),
    "quantize": Verb(
        "Hugging Face folder to nvidia-modelopt's quantised format: FP8, NVFP4, INT4",
        "megatron_r1.config.modelopt:QuantizeConfig",
        "megatron_r1.convert.modelopt:run_quantize",
    ),
    "inspect": Verb(
        "what a checkpoint is: family, parameters, dtypes, files, problems",
        "megatron_r1.config.inspect:InspectConfig",
        "megatron_r1.convert.inspect:run",
    ),
    "verify": Verb(
        "compare two checkpoints by the content of each tensor, and by their logits",
        "megatron_r1.config.inspect:VerifyConfig",
        "megatron_r1.convert.verify:run",
    ),
}
"""Commands that take paths and options, or a run file. Their result may say under "passed" whether all was well."""

NO_STAGES = {"sandbox serve", "inspect"}
"""Verbs without a result that a recipe could keep."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 done, 1 the run failed, 2 bad input, 74 the disk is full, 75 asked
        to end and saved, 69 a rank was late, 130/143 interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser(arguments)
    options, overrides = parser.parse_known_args(arguments)
    rank = int(os.environ.get("RANK", "0"))
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGUSR1, _terminate)  # a run that saves listens to it itself
    end_with_launcher()
    try:
        return options.act(options, overrides, arguments)
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
                f"megatron-r1 {options.verb}: interrupted; the same command goes on {_resumed(options.verb)}",
                file=sys.stderr,
            )
        return int(stop.code or 0) if isinstance(stop, SystemExit) else 130
    except Exception as error:
        if not _disk_full(error):
            raise
        from megatron_r1.recipe.process import DISK_FULL

        print(f"megatron-r1 {options.verb}: the disk is full ({error}); make room and run it again", file=sys.stderr)
        return DISK_FULL


def _run(options: argparse.Namespace, overrides: list[str], arguments: list[str]) -> int:
    from megatron_r1.config.load import dump, load

    verb = (VERBS | CHECKPOINT_VERBS)[options.verb]
    config = load(options.config, overrides, _import(verb.config))
    if options.dry_run:
        print(dump(config), end="")
        return 0
    parallel = getattr(config, "parallel", None)
    machines, processes = parallel.machines if parallel else (1, 1)
    if machines * processes > 1 and "RANK" not in os.environ:
        if machines != nodes():
            raise ConfigError(
                f"[parallel] asks for {machines} nodes of {processes} processes, but this was started on {nodes()}: "
                "sbatch starts it on several (docs/slurm.md)"
            )
        return relaunch(processes, arguments, getattr(config, "output", None))
    summary: dict[str, Any] = _import(verb.run)(config)
    if os.environ.get("RANK", "0") == "0":
        if hasattr(config, "output"):  # a server writes nothing
            config.output.mkdir(parents=True, exist_ok=True)
            (config.output / "config.toml").write_text(dump(config))
        if options.json:
            print(json.dumps(summary))
    return _code(summary)


def _checkpoint(options: argparse.Namespace, overrides: list[str], arguments: list[str]) -> int:
    """A command of `CHECKPOINT_VERBS`."""
    from megatron_r1.options import read

    verb = CHECKPOINT_VERBS[options.verb]
    if overrides:
        raise ConfigError(f"{options.verb} takes no {overrides[0]!r}; `megatron-r1 {options.verb} --help` lists all")
    with redirect_stdout(sys.stderr) if options.json else nullcontext():
        result: dict[str, Any] = _import(verb.run)(read(options, _import(verb.config)))
    if options.json:
        print(json.dumps(result))
    return _code(result)


def _resumed(verb: str) -> str:
    """Where a command that was stopped begins again."""
    if verb not in CHECKPOINT_VERBS:
        return "from the last checkpoint, if any"
    return "with the parts that it lacks" if verb in {"import", "export", "cast"} else "from the beginning"


def _code(result: dict[str, Any]) -> int:
    """1 where a comparison failed."""
    return 0 if result.get("passed", True) else 1


def _recipe(options: argparse.Namespace, overrides: list[str], arguments: list[str]) -> int:
    """`megatron-r1 run`."""
    from megatron_r1.recipe.choice import Choice
    from megatron_r1.recipe.expand import read_recipe
    from megatron_r1.recipe.run import run
    from megatron_r1.recipe.show import dry_run

    verbs = {name: verb for name, verb in (VERBS | CHECKPOINT_VERBS).items() if name not in NO_STAGES}
    plan = read_recipe(options.config, overrides, verbs)
    choice = Choice(options.anew, options.only, options.json)
    if options.dry_run or options.stage:
        dry_run(plan, choice, options.json, options.stage)
        return 0
    summary = run(plan, choice)
    if options.json:
        print(json.dumps(summary))
    return 0


def _plan(options: argparse.Namespace, overrides: list[str], arguments: list[str]) -> int:
    """`megatron-r1 plan`; overrides are the run file's."""
    from megatron_r1.options import read

    plan: Any = _import("megatron_r1.recipe.forecast:run")
    verbs = {name: verb for name, verb in (VERBS | CHECKPOINT_VERBS).items() if name not in NO_STAGES}
    code: int = plan(read(options, _import("megatron_r1.config.plan:PlanConfig")), overrides, options.json, verbs)
    return code


def _doctor(options: argparse.Namespace, overrides: list[str], arguments: list[str]) -> int:
    """`megatron-r1 doctor`."""
    if overrides:
        raise ConfigError(f"doctor takes no {overrides[0]!r}")
    doctor: Any = _import("megatron_r1.doctor.verb:run")
    code: int = doctor(options.config, options.quick, options.json)
    return code


def _status(options: argparse.Namespace, overrides: list[str], arguments: list[str]) -> int:
    """`megatron-r1 status`."""
    from megatron_r1.recipe.show import show_status

    if overrides:
        raise ConfigError(f"status takes no {overrides[0]!r}")
    show_status(options.output, options.json)
    return 0


def _disk_full(error: BaseException) -> bool:
    """Is it the file system's refusal of more, or was it raised because of that?

    Writers of tensors have errors of their own that only quote it.
    """
    full = isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}
    cause = error.__cause__ or error.__context__
    return full or os.strerror(errno.ENOSPC) in str(error) or (cause is not None and _disk_full(cause))


def _parser(arguments: list[str]) -> argparse.ArgumentParser:
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
        _add_run_file(command, name)
    _add_recipe(groups[""])
    _add_plan(groups[""], arguments)
    _add_doctor(groups[""])
    for name, verb in CHECKPOINT_VERBS.items():
        command = groups[""].add_parser(name, help=verb.help, description=verb.help, allow_abbrev=False)
        if arguments[:1] != [name]:
            continue
        if arguments[1:2] and arguments[1].endswith(".toml"):
            _add_run_file(command, name)
            continue
        from megatron_r1.options import add

        add(command, _import(verb.config))
        command.add_argument("--json", action="store_true", help="print the result as JSON at the end")
        command.set_defaults(verb=name, act=_checkpoint)
    return parser


def _add_run_file(command: argparse.ArgumentParser, verb: str) -> None:
    command.add_argument("config", type=Path, metavar="run.toml")
    command.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")
    command.add_argument("--json", action="store_true", help="print the run's figures as JSON at the end")
    command.set_defaults(verb=verb, act=_run)


def _add_recipe(commands: Any) -> None:
    about = "run the stages of a recipe; what is done and unchanged is not done again"
    command = commands.add_parser("run", help=about, description=about, allow_abbrev=False)
    command.add_argument("config", type=Path, metavar="recipe.toml")
    command.add_argument("--from", dest="anew", metavar="STAGE", help="run it and all that depends on it anew")
    command.add_argument("--only", metavar="STAGE", help="run no other stage")
    command.add_argument("--dry-run", action="store_true", help="check everything, print the graph and its plan, stop")
    command.add_argument("--stage", metavar="STAGE", help="print the run file of a stage and stop")
    command.add_argument("--json", action="store_true", help="print the figures as JSON at the end; the graph, if dry")
    command.set_defaults(verb="run", act=_recipe)
    about = "the stages of a recipe that has been run, their state and times"
    command = commands.add_parser("status", help=about, description=about, allow_abbrev=False)
    command.add_argument("output", type=Path, metavar="DIR", help="the recipe's `output`")
    command.add_argument("--json", action="store_true", help="the same as JSON")
    command.set_defaults(verb="status", act=_status)


def _add_plan(commands: Any, arguments: list[str]) -> None:
    about = "memory of every rank, time of a step and cost of a run file, before it is started"
    command = commands.add_parser("plan", help=about, description=about, allow_abbrev=False)
    if arguments[:1] == ["plan"]:
        from megatron_r1.options import add

        add(command, _import("megatron_r1.config.plan:PlanConfig"))
        command.add_argument("--json", action="store_true", help="print the plan as JSON")
        command.set_defaults(verb="plan", act=_plan)


def _add_doctor(commands: Any) -> None:
    about = "what is installed, what fits together, what is missing, and what this machine can run"
    command = commands.add_parser("doctor", help=about, description=about, allow_abbrev=False)
    command.add_argument("config", nargs="?", type=Path, metavar="run.toml", help="can it run here? or a recipe?")
    command.add_argument("--quick", action="store_true", help="without torch's own look at GPUs, which takes seconds")
    command.add_argument("--json", action="store_true", help="print all of it as JSON")
    command.set_defaults(verb="doctor", act=_doctor)


def _import(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _terminate(signum: int, frame: FrameType | None) -> None:
    """SIGTERM unwinds like an error, so that every `with` closes what it opened."""
    sys.exit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
