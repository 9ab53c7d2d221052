"""One rollout in figures: the same for training steps and for held-out evaluations."""

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

from megatron_r1.report.reflection import reflective_words
from megatron_r1.types import Group


def rollout_figures(groups: Sequence[Group]) -> dict[str, float]:
    """Means over all samples.

    `reward` is the weighted sum; `reward/<name>` its parts, over the samples they apply to; `accuracy` the share of
    right answers among those that could be judged, and `format` repeats the part of that name. `response_length` is
    in sampled tokens, `tool_calls` are replies of tools and `tool_tokens` their length, both a response,
    `reflective_words` per 1000 responses, `truncated` the share cut at the length limit,
    `uniform_groups` the share of questions whose samples all got the same reward and so teach nothing,
    `constant_rewards` how many parts are the same for all samples. Of a mixture of tasks `accuracy/<member>` is that of
    one member's questions, and `accuracy/<difficulty>` that of the questions whose metadata say `difficulty`.
    """
    samples = [sample for group in groups for sample in group.samples]
    figures = {
        "reward": fmean(sample.reward for sample in samples),
        "response_length": fmean(sample.length for sample in samples),
        "truncated": fmean(not sample.finished for sample in samples),
        "reflective_words": 1000 * fmean(reflective_words(sample.text) for sample in samples),
        "uniform_groups": fmean(uniform(group) for group in groups),
        "constant_rewards": float(len(constant_rewards(groups))),
    }
    if any(sample.mask for sample in samples):
        figures["tool_calls"] = fmean(_replies(sample.mask) for sample in samples)
        figures["tool_tokens"] = fmean(len(sample.tokens) - sample.length for sample in samples)
    for name in samples[0].rewards:
        parts = [value for sample in samples if (value := sample.rewards[name]) is not None]
        if parts:
            figures[f"reward/{name}"] = fmean(parts)
            if name == "format":
                figures[name] = fmean(parts)
    return figures | _accuracies(groups)


def _replies(mask: Sequence[bool]) -> int:
    """Runs of tokens that are a tool's."""
    return sum(before and not sampled for before, sampled in pairwise(mask))


def _accuracies(groups: Sequence[Group]) -> dict[str, float]:
    judged: dict[str, list[bool]] = {}
    for group in groups:
        verdicts = [sample.correct for sample in group.samples if sample.correct is not None]
        kinds = (group.question.metadata.get(key) for key in ("member", "difficulty"))
        for name in ("accuracy", *(f"accuracy/{kind}" for kind in kinds if kind is not None)):
            judged.setdefault(name, []).extend(verdicts)
    return {name: fmean(verdicts) for name, verdicts in judged.items() if verdicts}


def uniform(group: Group) -> bool:
    """Whether all samples got the same reward, so that a comparison of them teaches nothing."""
    return len({sample.reward for sample in group.samples}) == 1


def constant_rewards(groups: Sequence[Group]) -> dict[str, float]:
    """Reward parts that are the same for all samples of a rollout, and what they are."""
    constant = {}
    samples = [sample for group in groups for sample in group.samples]
    for name in samples[0].rewards:
        values = {value for sample in samples if (value := sample.rewards[name]) is not None}
        if len(values) == 1:
            constant[name] = values.pop()
    return constant


def throughput(groups: Sequence[Group], seconds: float) -> dict[str, float]:
    """`tokens_per_second`: response tokens over the time of sampling and judging them."""
    return {"tokens_per_second": sum(sample.length for group in groups for sample in group.samples) / seconds}


def heldout_figures(groups: Sequence[Group]) -> dict[str, float]:
    """The same figures under the names of an evaluation: `heldout_accuracy`, `heldout_format` ..."""
    figures = rollout_figures(groups)
    chosen = {"accuracy": "accuracy", "format": "format", "reward": "reward", "response_length": "length"}
    chosen |= {name: name for name in figures if name.startswith("accuracy/")}
    return {f"heldout_{name}": figures[key] for key, name in chosen.items() if key in figures}
