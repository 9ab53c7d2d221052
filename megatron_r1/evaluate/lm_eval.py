"""`megatron-r1 lm-eval`: benchmarks of EleutherAI's lm-evaluation-harness, on a model behind vLLM."""

from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from megatron_r1.config.lm_eval import LmEvalConfig
from megatron_r1.data.files import write_json
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.evaluate.harness import check_installed, check_tasks, measure
from megatron_r1.report.journal import finite
from megatron_r1.rollout.client import Client
from megatron_r1.rollout.text_server import text_server

ERROR = "_stderr"
"""How the harness calls a standard error: `acc_stderr,none` is that of `acc,none`."""


def run(config: LmEvalConfig) -> dict[str, Any]:
    """Write `results.json`; killed and started again, go on with the responses that the server has given.

    Returns:
        The model, and the figures of each task and group of tasks (see `figures`).

    Raises:
        ConfigError: the harness is not installed, or does not know a task.
        DataError: no tokenizer or model where they should be.
        EngineError: the server does not start or dies.
        HarnessError: the harness fails.
    """
    check_installed()
    tokenizer = Tokenizer.load(config.tokenizer or config.model.path)
    check_tasks(config)
    log, console = config.output / "logs/server.log", Console(stderr=True)
    console.print(f"starting the server, which logs to {log}", style="dim")
    with text_server(config.model, tokenizer.path, config.rollout, log) as client:
        results = measure(config, client.server.url, lambda: _check_alive(client))
    summary: dict[str, Any] = finite(
        {
            "model": str(config.model.path),
            "harness": f"lm_eval {results.get('lm_eval_version')}",
            "limit": config.limit,
            "apply_chat_template": config.apply_chat_template,
            "generation": config.generation,
            **figures(results),
        }
    )
    write_json(config.output / "results.json", summary)
    console.print(_table(summary))
    return summary


def figures(results: dict[str, Any]) -> dict[str, Any]:
    """The figures of the harness's own file.

    Returns:
        `tasks`: name -> `version`, `fewshot`, `questions`, and each metric with its standard error: `acc`, `acc_error`.
        What the harness takes from responses by a filter keeps that in its name: `exact_match,strict-match`. An error
        that it does not estimate is None. `groups`: the same of groups of tasks, such as mmlu.
    """
    groups = results.get("groups", {})
    tasks = {name: _entry(results, name, found) for name, found in results["results"].items() if name not in groups}
    return {"tasks": tasks, "groups": {name: _entry(results, name, found) for name, found in groups.items()}}


def _entry(results: dict[str, Any], name: str, found: dict[str, Any]) -> dict[str, Any]:
    entry = {
        "version": results.get("versions", {}).get(name),
        "fewshot": results.get("n-shot", {}).get(name),
        "questions": results.get("n-samples", {}).get(name, {}).get("effective"),
    }
    return entry | _metrics(found)


def _metrics(found: dict[str, Any]) -> dict[str, float | None]:
    """Metric -> value, and its error, from keys such as `acc,none` and `acc_stderr,none`."""
    metrics: dict[str, float | None] = {}
    for key, value in found.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith(ERROR) or not isinstance(value, int | float):
            continue
        error = found.get(f"{metric}{ERROR},{chosen}")
        filtered = "" if chosen == "none" else f",{chosen}"
        metrics[metric + filtered] = value
        metrics[f"{metric}_error{filtered}"] = error if isinstance(error, int | float) else None
    return metrics


def _check_alive(client: Client) -> None:
    if not client.server.alive():
        raise client.server.failure("has died")


def _table(summary: dict[str, Any]) -> Table:
    """A row for each metric."""
    limit = f", only the first {summary['limit']:,} questions of each" if summary["limit"] else ""
    table = Table(title=f"{summary['model']}, {summary['harness']}{limit}", title_justify="left", box=None)
    for column in ("task", "fewshot", "questions", "metric", "value", "error"):
        justify: Literal["left", "right"] = "left" if column in {"task", "metric"} else "right"
        table.add_column(column, justify=justify, header_style="dim", no_wrap=True)
    for name, entry in (summary["tasks"] | summary["groups"]).items():
        for metric, value in entry.items():
            base, comma, chosen = metric.partition(",")
            error = f"{base}_error{comma}{chosen}"
            if error in entry:
                cells = (entry["fewshot"], entry["questions"], metric, value, entry[error])
                table.add_row(name, *map(_shown, cells))
    return table


def _shown(value: Any) -> str:
    return "–" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
