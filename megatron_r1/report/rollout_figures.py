"""One rollout in figures: the same for training steps and for held-out evaluations."""

from collections.abc import Sequence
from statistics import fmean

from megatron_r1.report.reflection import reflective_words
from megatron_r1.types import Group


def rollout_figures(groups: Sequence[Group]) -> dict[str, float]:
    """Means over all samples.

    `reward` is the weighted sum; `reward/<name>` its parts, over the samples they apply to; `accuracy` the share of
    right answers among those that could be judged, and `format` repeats the part of that name. `response_length` is
    in tokens, `reflective_words` per 1000 responses, `truncated` the share cut at the length limit,
    `uniform_groups` the share of questions whose samples all got the same reward and so teach nothing. Of a mixture
    of tasks `accuracy/<member>` is that of one member's questions.
    """
    samples = [sample for group in groups for sample in group.samples]
    figures = {
        "reward": fmean(sample.reward for sample in samples),
        "response_length": fmean(len(sample.tokens) for sample in samples),
        "truncated": fmean(not sample.finished for sample in samples),
        "reflective_words": 1000 * fmean(reflective_words(sample.text) for sample in samples),
        "uniform_groups": fmean(len({sample.reward for sample in group.samples}) == 1 for group in groups),
    }
    for name in samples[0].rewards:
        parts = [value for sample in samples if (value := sample.rewards[name]) is not None]
        if parts:
            figures[f"reward/{name}"] = fmean(parts)
            if name == "format":
                figures[name] = fmean(parts)
    return figures | _accuracies(groups)


def _accuracies(groups: Sequence[Group]) -> dict[str, float]:
    judged: dict[str, list[bool]] = {}
    for group in groups:
        verdicts = [sample.correct for sample in group.samples if sample.correct is not None]
        member = group.question.metadata.get("member")
        for name in ("accuracy", f"accuracy/{member}") if member else ("accuracy",):
            judged.setdefault(name, []).extend(verdicts)
    return {name: fmean(verdicts) for name, verdicts in judged.items() if verdicts}


def throughput(groups: Sequence[Group], seconds: float) -> dict[str, float]:
    """`tokens_per_second`: response tokens over the time of sampling and judging them."""
    return {"tokens_per_second": sum(len(sample.tokens) for group in groups for sample in group.samples) / seconds}


def heldout_figures(groups: Sequence[Group]) -> dict[str, float]:
    """The same figures under the names of an evaluation: `heldout_accuracy`, `heldout_format` ..."""
    figures = rollout_figures(groups)
    chosen = {"accuracy": "accuracy", "format": "format", "reward": "reward", "response_length": "length"}
    chosen |= {name: name for name in figures if name.startswith("accuracy/")}
    return {f"heldout_{name}": figures[key] for key, name in chosen.items() if key in figures}
