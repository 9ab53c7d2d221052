"""The metrics that have a name here: how they are labelled, printed and grouped into charts.

A metric that is not listed still appears everywhere: under its own name, in a chart of its own.
"""

import math
from dataclasses import dataclass
from typing import Literal

Style = Literal["percent", "number", "scientific", "count", "seconds"]


@dataclass(frozen=True)
class Metric:
    """How one metric is shown."""

    label: str
    short: str
    """Label of the one-line console."""
    style: Style = "number"


METRICS = {
    "reward": Metric("Reward", "reward"),
    "learner_idle": Metric("Learner idle", "wait", "percent"),
    "fleet_idle": Metric("Fleet idle", "idle fleet", "percent"),
    "fleet_engines_ready": Metric("Engines ready", "engines", "count"),
    "fleet_engines_lost": Metric("Engines lost so far", "lost", "count"),
    "fleet_engines_returned": Metric("Engines returned so far", "returned", "count"),
    "fleet_samples_again": Metric("Samples asked again so far", "again", "count"),
    "importance_changed": Metric("Importance weights bounded", "bounded", "percent"),
    "accuracy": Metric("Accuracy", "acc", "percent"),
    "format": Metric("Format", "format", "percent"),
    "response_length": Metric("Response length, tokens", "length", "count"),
    "kl": Metric("KL to the reference", "kl", "scientific"),
    "entropy": Metric("Entropy, nats", "entropy"),
    "logprob_difference_mean": Metric("Logprob difference, mean", "dlogp", "scientific"),
    "logprob_difference_max": Metric("Logprob difference, max", "dlogp max", "scientific"),
    "own_routing_difference_mean": Metric(
        "Logprob difference without routing replay, mean", "unreplayed", "scientific"
    ),
    "own_routing_difference_max": Metric("The same, max", "unreplayed max", "scientific"),
    "rerouted_choices": Metric("Choices of experts that replay changes", "rerouted", "percent"),
    "rerouted_tokens": Metric("Tokens with such a choice", "rerouted tokens", "percent"),
    "loss": Metric("Loss", "loss"),
    "validation_loss": Metric("Validation loss", "val loss"),
    "test_loss": Metric("Test loss", "test loss"),
    "mtp_loss": Metric("MTP loss", "mtp"),
    "grad_norm": Metric("Gradient norm", "grad"),
    "lr": Metric("Learning rate", "lr", "scientific"),
    "tokens_per_second": Metric("Tokens per second", "tok/s", "count"),
    "tflops": Metric("TFLOP/s of each device", "TFLOP/s"),
    "mfu": Metric("Model FLOPs utilisation", "MFU", "percent"),
    "load_violation": Metric("Largest expert load above the mean", "load"),
    "load_violation_max": Metric("The same, worst layer", "load max"),
    "idle_experts": Metric("Experts without a token", "idle experts", "percent"),
    "bias_spread": Metric("Routing bias, largest less smallest", "bias", "scientific"),
    "memory_peak_max": Metric("Peak memory of a process, GiB", "GiB"),
    "truncated": Metric("Truncated responses", "cut", "percent"),
    "clip_fraction": Metric("Clipped ratios", "clipped", "percent"),
    "reflective_words": Metric("Reflective words per 1000 responses", "reflect", "count"),
    "value_loss": Metric("Value loss", "value"),
    "explained_variance": Metric("Variance that the critic explains", "explained"),
    "zero_advantages": Metric("Samples without advantage", "idle", "percent"),
    "dropped_groups": Metric("Groups dropped", "dropped", "count"),
    "questions_passed_over": Metric("Questions passed over", "passed over", "count"),
    "margin": Metric("Margin", "margin"),
    "heldout_margin": Metric("Held-out margin", "held-out margin"),
    "heldout_loss": Metric("Held-out loss", "held-out loss"),
    "heldout_accuracy": Metric("Held-out accuracy", "held-out acc", "percent"),
    "heldout_format": Metric("Held-out format", "held-out format", "percent"),
    "heldout_length": Metric("Held-out response length, tokens", "held-out length", "count"),
}

CONSOLE = (
    *("reward", "accuracy", "format", "response_length", "loss", "validation_loss", "grad_norm"),
    *("kl", "entropy", "logprob_difference_mean", "tokens_per_second", "mfu"),
)
"""What the console shows, in this order, of the metrics that a run has."""


MANY = 8
"""Curves of a chart that can be told apart."""


@dataclass(frozen=True)
class ChartPlan:
    """A chart of report.html: it appears when the run has one of its metrics."""

    title: str
    metrics: tuple[str, ...]
    """Names; one that ends in `/` stands for all names that start with it. More than `MANY` of these are shown as the
    least, the median and the most of them."""
    note: str = ""
    log: bool = False


CHARTS = (
    ChartPlan("Reward", ("reward", "reward/"), "weighted total, and each part before weighting"),
    ChartPlan("Accuracy", ("heldout_accuracy", "accuracy", "accuracy/"), "held-out questions, and those trained on"),
    ChartPlan("Format", ("heldout_format", "format"), "share of responses in the asked-for form"),
    ChartPlan("Response length", ("response_length", "heldout_length"), "tokens, mean"),
    ChartPlan("Reflective words", ("reflective_words",), "wait, but, however, verify ... per 1000 responses"),
    ChartPlan("KL", ("kl",), "policy to reference, k3 estimate, nats per token"),
    ChartPlan("Entropy", ("entropy",), "of the sampled distribution, nats per token"),
    ChartPlan(
        "Trainer and rollout",
        (
            *("logprob_difference_mean", "logprob_difference_max"),
            *("own_routing_difference_mean", "own_routing_difference_max"),
        ),
        "difference of the log-probability of the same token, nats, log scale",
        log=True,
    ),
    ChartPlan("Loss", ("loss", "validation_loss", "heldout_loss", "mtp_loss"), "training objective"),
    ChartPlan("Margin", ("margin", "heldout_margin"), "chosen above rejected"),
    ChartPlan("Critic", ("value_loss",), "squared error of the value, clipped"),
    ChartPlan("Explained variance", ("explained_variance",), "of the returns, by the critic"),
    ChartPlan("Gradient norm", ("grad_norm",), "before clipping"),
    ChartPlan("Learning rate", ("lr",), "at the end of the step"),
    ChartPlan("Throughput", ("tokens_per_second",), "tokens per second"),
    ChartPlan("Operations", ("tflops",), "TFLOP/s of each device, recomputation not counted"),
    ChartPlan("Utilisation", ("mfu",), "operations over what the device can do at most"),
    ChartPlan("Memory", ("memory_peak_max",), "peak of the process that needs most, GiB"),
    ChartPlan("Clipped and truncated", ("clip_fraction", "truncated"), "share of ratios, share of responses"),
    ChartPlan(
        "Expert load",
        ("load_violation", "load_violation_max"),
        "share by which the busiest expert of a layer is above the mean (MaxVio), mean over layers and worst layer",
    ),
    ChartPlan("Expert load by layer", ("load_violation/",), "the same of each layer, MTP layers last"),
    ChartPlan("Idle experts", ("idle_experts",), "share of experts without a token in a step"),
    ChartPlan("Staleness", ("staleness/",), "share of a step's groups by the age of their weights, steps"),
    ChartPlan("Idle", ("learner_idle", "fleet_idle"), "share of the time"),
    ChartPlan("Tokens per second of an engine", ("fleet_tokens_per_s/",), "while it had something to do"),
    ChartPlan(
        "Queue of an engine",
        ("fleet_outstanding_tokens/",),
        "tokens that it has still to make, as its responses are long on average; mean while it had something to do",
    ),
    ChartPlan("Weights of an engine", ("fleet_weights/",), "version at the end of the step"),
    ChartPlan(
        "Engines", ("fleet_engines_ready", "fleet_engines_lost", "fleet_engines_returned"), "lost and returned: so far"
    ),
    ChartPlan(
        "Handing over weights",
        ("sync_seconds/",),
        "seconds of a step: gather them, write or send them; engines hold, load, resume (mean over engines)",
    ),
    ChartPlan(
        "Engine and learner", ("mismatch_kl", "mismatch_kl_kept"), "KL(engine || learner), nats per token", log=True
    ),
    ChartPlan("Importance weights changed", ("importance_changed",), "share of tokens"),
    ChartPlan("Routing replay", ("rerouted_choices", "rerouted_tokens"), "share that the learner would send elsewhere"),
    ChartPlan("Routing bias", ("bias_spread",), "largest less smallest of a layer, mean over layers"),
)


def label(name: str) -> str:
    """What a metric is called in a table or a legend."""
    return METRICS[name].label if name in METRICS else name.replace("_", " ")


def show(name: str, value: float | None) -> str:
    """A metric's value as text, short and of steady width."""
    if value is None or not math.isfinite(value):
        return "n/a"
    return show_as(METRICS[name].style if name in METRICS else "number", value)


def show_as(style: Style, value: float) -> str:
    """A number in one of the styles."""
    if style == "percent":
        return f"{100 * value:.1f} %"
    if style == "scientific":
        return f"{value:.2e}" if value else "0"
    if style == "count":
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"
    if style == "seconds":
        return duration(value)
    magnitude = abs(value)
    if magnitude and (magnitude < 1e-3 or magnitude >= 1e6):
        return f"{value:.2e}"
    return f"{value:.3f}" if magnitude < 1000 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """`4.2 s`, `3 min 20 s`, `2 h 05 min` or `3 d 04 h`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02d} h"
