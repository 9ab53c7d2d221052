"""GRPO end to end: samples per second of `megatron-r1 rl` against TRL's GRPOTrainer.

    python tools/bench/grpo_vs_trl.py runs/smollm2_base

The argument is SmolLM2-135M-Instruct as `tools/smollm2.py` makes it; it is measured, and a model of 20M parameters with
random weights and the same tokenizer (`--models` names one of them). Both sides train the same model on the same
prompts with the same reward, group size, limit of length, updates, rate, threads and dtype, without a reference model.
Each is a process of its own that does one step when it is its turn and sleeps while the other does; the clock runs
from the word to go until it asks for the next turn, so nothing between two steps is left out, and start-up is. TRL's
settings, and why, are in `grpo_sides.py`; `--trl KEY=VALUE` changes them (KEY is an argument of GRPOConfig, VALUE
JSON), `--sweep` times a choice of them against each other. `--ours KEY=VALUE` overrides the run file of our side.

TRL is no dependency of ours: `pip install --no-deps trl==1.16.0`.
"""

import argparse
import importlib.util
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from grpo_sides import PHASES, Ours, Side, Theirs
from grpo_work import Work
from paired import Comparison, measure, report
from reasoning_gym import create_dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

INSTALL = "pip install --no-deps trl==1.16.0"
RANDOM = "random-20M"
TWENTY = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 9,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
"""Changes to the other model's config.json; 20.3 million parameters, 12.6 of them embeddings."""
QUESTIONS = ("chain_sum", "leg_counting", "calendar_arithmetic", "gsm_symbolic")
"""Data sets of reasoning_gym in turn: their prompts differ in length, and so do the answers."""
SWEEP: dict[str, dict[str, Any]] = {
    "as measured": {},
    "microbatches of 8": {"per_device_train_batch_size": 8},
    "microbatches of 32": {"per_device_train_batch_size": 32},
    "float32 weights, bfloat16 autocast (TRL's default)": {"bf16": True, "model_init_kwargs": {"dtype": "float32"}},
    "float32 weights": {"model_init_kwargs": {"dtype": "float32"}},
    "torch.compile": {"torch_compile": True},
    "static cache": {"cache_implementation": "static"},
    "continuous batching": {"use_transformers_continuous_batching": True},
    "vLLM in the trainer's process": {"use_vllm": True, "vllm_importance_sampling_correction": False},
}
"""TRL settings that might be faster."""


def write_random(folder: Path, like: Path) -> Path:
    """A small model with random weights and the tokenizer of `like`. Its answers run to the limit."""
    torch.manual_seed(0)
    config = json.loads((like / "config.json").read_text()) | TWENTY | {"head_dim": 32}
    LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(like).save_pretrained(folder)
    return folder


def write_prompts(file: Path, model: Path, count: int) -> int:
    """Questions in the model's chat format, without its standing system prompt. Returns the longest one's tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    sets = [create_dataset(name, size=count, seed=1) for name in QUESTIONS]
    rows, longest = [], 0
    for index in range(count):
        question = sets[index % len(sets)][index]["question"]
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        # Our tokenizer begins a prompt with <|im_start|>, which SmolLM2 names as its beginning of a sequence.
        rows.append({"text": text, "bare": text.removeprefix(tokenizer.bos_token)})
        longest = max(longest, len(tokenizer(text)["input_ids"]))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return longest


def compare(work: Work, folder: Path, options: argparse.Namespace) -> None:
    """Both sides, step about."""
    with Ours(work, folder, options.port, options.ours) as ours:
        ours.wait_until_ready()
        with Theirs(work, folder, changes(options.trl)) as theirs:
            theirs.wait_until_ready()
            trl = f"TRL {version('trl')}'s GRPOTrainer"
            # Tokens are of the same steps: `measure` has both do one for the first pair, then asks the second.
            comparisons = [
                Comparison("megatron-r1 rl", "samples/s", trl, samples(work, ours), samples(work, theirs), target=2.0),
                Comparison("the same in tokens", "tokens/s", trl, tokens(ours), tokens(theirs)),
            ]
            measure(comparisons, options.rounds)
    spent = {side.name: phases(side) for side in (ours, theirs)}
    title = f"GRPO end to end, {Path(work.model).name}"
    report(title, comparisons, options.json, **described(work), **({"phases": spent} if options.json else {}))
    if not options.json:
        Console().print(table(spent))


def samples(work: Work, side: Side) -> Callable[[], float]:
    """A step, in samples per second."""
    return lambda: work.samples / side.step()


def tokens(side: Side) -> Callable[[], float]:
    """Of the step just done."""
    return lambda: side.last["tokens"] / side.last["seconds"]


def phases(side: Side) -> dict[str, float]:
    """Median seconds of each phase, of all steps but the first; `other` is what is in none."""
    steps = side.steps[1:]
    found = {name: [step.get(name, 0.0) for step in steps] for name in PHASES}
    if isinstance(side, Theirs):  # it is what TRL does once its inputs are prepared
        named = [sum(step.get(name, 0.0) for name in PHASES) for step in steps]
        found["update"] = [step["seconds"] - rest for step, rest in zip(steps, named, strict=True)]
    found["other"] = [step["seconds"] - sum(found[name][index] for name in PHASES) for index, step in enumerate(steps)]
    found["step"] = [step["seconds"] for step in steps]
    found["tokens of answers"] = [step["tokens"] for step in steps]
    return {name: statistics.median(values) for name, values in found.items()}


def table(spent: dict[str, dict[str, float]]) -> Table:
    """Where the time of a step goes on each side."""
    shown = Table(title="seconds of a step (median)", title_justify="left")
    shown.add_column("")
    for name in spent:
        shown.add_column(name, justify="right")
    for row in next(iter(spent.values())):
        cells = [figures[row] for figures in spent.values()]
        total = [figures["step"] for figures in spent.values()]
        shares = [f"{cell:.2f} ({cell / whole:.0%})" for cell, whole in zip(cells, total, strict=True)]
        shown.add_row(row, *([f"{cell:,.0f}" for cell in cells] if row == "tokens of answers" else shares))
    return shown


def sweep(work: Work, folder: Path, options: argparse.Namespace) -> None:
    """Times TRL's settings, one after another; what does not run says why."""
    shown = Table(title=f"TRL {version('trl')}'s settings, {Path(work.model).name}", title_justify="left")
    for column in ("setting", "samples/s", "rollout", "update", "step, s"):
        shown.add_column(column)
    for name, chosen in SWEEP.items():
        try:
            with Theirs(work, folder, changes(options.trl) | chosen) as theirs:
                theirs.wait_until_ready()
                for _ in range(options.rounds + 1):
                    theirs.step()
        except SystemExit as error:
            shown.add_row(name, str(error).splitlines()[-1][:100])
            continue
        found = phases(theirs)
        figures = (work.samples / found["step"], found["rollout"], found["update"], found["step"])
        shown.add_row(name, *(f"{figure:.3g}" for figure in figures))
    Console().print(shown)


def described(work: Work) -> dict[str, Any]:
    """The work, for people."""
    return {
        "step": f"{work.questions} prompts x {work.group} = {work.samples} samples, {work.updates} update(s)",
        "tokens": f"prompts up to {work.prompt_tokens}, answers up to {work.answer_tokens}",
        "dtype": work.dtype,
        "threads": work.threads,
    }


def changes(words: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE to arguments of GRPOConfig."""
    pairs = (word.partition("=") for word in words)
    return {key: json.loads(value) for key, _, value in pairs}


def arguments() -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("smollm2", type=Path, help="SmolLM2-135M-Instruct, from tools/smollm2.py")
    made.add_argument("--models", nargs="+", choices=(RANDOM, "smollm2"), default=[RANDOM, "smollm2"])
    made.add_argument("--questions", type=int, default=4, help="prompts of a step (default %(default)s)")
    made.add_argument("--group", type=int, default=8, help="G, answers to each (default %(default)s)")
    made.add_argument("--answer-tokens", type=int, default=128, help="limit of an answer (default %(default)s)")
    made.add_argument("--updates", type=int, default=1, help="optimizer updates of a step (default %(default)s)")
    made.add_argument("--rounds", type=int, default=3, help="steps of each side that count (default %(default)s)")
    made.add_argument("--threads", type=int, default=2, help="of each side (default %(default)s)")
    made.add_argument("--port", type=int, default=9000, help="of our rollout engine (default %(default)s)")
    made.add_argument("--ours", action="append", default=[], metavar="KEY=VALUE", help="override of our run file")
    made.add_argument("--trl", action="append", default=[], metavar="KEY=VALUE", help="argument of GRPOConfig, JSON")
    made.add_argument("--sweep", action="store_true", help="compare TRL's settings with each other instead")
    made.add_argument("--json", action="store_true", help="one JSON object a model instead of tables")
    return made.parse_args()


def main() -> None:
    options = arguments()
    if importlib.util.find_spec("trl") is None:
        raise SystemExit(f"TRL, which this compares with, is not installed: {INSTALL}")
    if not (options.smollm2 / "config.json").is_file():
        raise SystemExit(f"{options.smollm2} holds no model: make it with tools/smollm2.py {options.smollm2}")
    for name in options.models:
        with tempfile.TemporaryDirectory(prefix="grpo-") as made:
            folder = Path(made)
            model = options.smollm2.resolve() if name == "smollm2" else write_random(folder / RANDOM, options.smollm2)
            steps = options.rounds + 2  # the first is not counted, the last not done
            longest = write_prompts(folder / "prompts.jsonl", options.smollm2, options.questions * steps)
            work = Work(
                model=str(model),
                prompts=str(folder / "prompts.jsonl"),
                questions=options.questions,
                group=options.group,
                updates=options.updates,
                prompt_tokens=longest,
                answer_tokens=options.answer_tokens,
                steps=steps,
                threads=options.threads,
            )
            (sweep if options.sweep else compare)(work, folder, options)


if __name__ == "__main__":
    main()
