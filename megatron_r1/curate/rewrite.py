"""Responses in another form, written by a model: readable reasoning, a summary, reasoning for a ready answer.

What the model writes is put into the row's layout, judged once more and filtered once more, so that no step of the
rewriting can let in what selection has kept out (DeepSeek-R1 v2, B.3.2, has people look again).
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_r1.config.collect import CollectConfig, RewriteSection, SampleSource, SourceSection
from megatron_r1.config.section import Component
from megatron_r1.curate import filters, layout
from megatron_r1.curate.candidates import Candidate, Ledger
from megatron_r1.curate.fleets import Fleets
from megatron_r1.curate.selection import Fault, verdict
from megatron_r1.errors import ConfigError
from megatron_r1.registry import resolve
from megatron_r1.reward.response import response
from megatron_r1.rollout.answers import Answer
from megatron_r1.rollout.sampling import Sampler, sample_seed
from megatron_r1.seeds import stream_seed
from megatron_r1.types import Question, Sample

_KEY = "rewriting"
"""In the metadata of a question: what is asked instead of it, and how the new response is made."""


class Rewriter(Sampler):
    """Asks for a response to be rewritten, and has the judge see the row that comes of it.

    A text that lacks a part of the layout is empty.
    """

    def prompt(self, question: Question) -> str:
        return str(question.metadata[_KEY]["ask"])

    def edited(self, question: Question, sample: Sample) -> Sample:
        plan = question.metadata[_KEY]
        values = plan["parts"] | {"text": response(replace(question, prompt=plan["ask"]), sample).strip()}
        if layout.lacking(plan["form"], values):
            return replace(sample, text="")
        final = layout.parts(question, layout.fill(plan["form"], values))
        if layout.lacking(plan["layout"], final):
            return replace(sample, text="")
        return replace(sample, text=layout.continuation(question.prompt, layout.fill(plan["layout"], final)))


def read_prompt(name: str, section: RewriteSection) -> str:
    """The text that a model is asked with.

    Raises:
        ConfigError: no such file, or nothing of the response in it.
    """
    try:
        text = section.prompt.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"sources.{name}.rewrite: cannot read the prompt {section.prompt}: {error}") from error
    layout.check(text, f"the prompt {section.prompt}")
    return text


def drawn(seed: int, name: str, candidates: Sequence[Candidate], share: float) -> list[bool]:
    """Which candidates are rewritten: `share` of them, rounded, drawn by the seed."""
    chosen = random.Random(stream_seed("rewrite", seed, name)).sample(
        range(len(candidates)), round(share * len(candidates))
    )
    marks = [False] * len(candidates)
    for number in chosen:
        marks[number] = True
    return marks


def rewritten(
    config: CollectConfig, name: str, candidates: Sequence[Candidate], fleets: Fleets, ledger: Ledger
) -> list[Candidate]:
    """The candidates whose new response passes, laid out; the others are dropped.

    Raises:
        EngineError: the engines do not start or die.
    """
    source = config.sources[name]
    section = source.rewrite
    assert section is not None
    rewards = _rewards(source, section)
    sampling = section.sampling(
        config.models[section.model],
        samples=section.attempts,
        reward_models=config.reward_models,
        reward_workers=config.reward_workers,
        reward_timeout=config.reward_timeout,
        seed=stream_seed("rewrite", config.seed, name),
    )
    task = source.data.task if isinstance(source, SampleSource) else None
    text = read_prompt(name, section)
    made = {"model": str(sampling.model.path), "prompt": str(section.prompt)}
    kept: list[Candidate] = []
    with Rewriter(sampling, config.output / "rewritten" / name, fleets.opener(section.model)) as rewriter:
        asked = [(one, _question(one, text, source, section, rewards)) for one in candidates]
        fitting = []
        for one, question in asked:
            if len(rewriter.tokenizer.encode_prompt(rewriter.prompt(question))) < sampling.rollout.max_model_len:
                fitting.append((one, question))
            else:
                ledger.drop(one, "rewrite: no room for the prompt")
        answers = rewriter.answers((question for _, question in fitting), len(fitting), rewards, task, section.attempts)
        for position, ((one, _), (question, attempts)) in enumerate(zip(fitting, answers, strict=True)):
            faults = [_fault(config, source, rewards, question, answer) for answer in attempts]
            if None not in faults:
                reasons = [fault for fault in faults if fault]
                ledger.drop(one, f"rewrite: {reasons[0][0]}", [answer.text for answer in attempts])
                continue
            number = faults.index(None)
            seed = sample_seed(sampling, position, number)
            kept.append(_replaced(one, attempts[number], {**made, "attempt": number, "seed": seed}))
    return kept


def _rewards(source: SourceSection, section: RewriteSection) -> dict[str, Component]:
    """What judges the new responses."""
    if section.rewards or not isinstance(source, SampleSource):
        return section.rewards
    return source.rewards


def _question(
    one: Candidate, text: str, source: SourceSection, section: RewriteSection, rewards: dict[str, Component]
) -> Question:
    """The stored question, with what the model is asked in its place."""
    parts = layout.parts(one.question, one.response)
    plan = {"ask": layout.fill(text, parts), "parts": parts, "form": section.form, "layout": source.response}
    named = one.question.rewards
    return replace(
        one.question,
        prompt=one.prompt,
        metadata={**one.question.metadata, _KEY: plan},
        rewards=named if named and set(named) <= set(rewards) else None,
    )


def _fault(
    config: CollectConfig, source: SourceSection, rewards: dict[str, Component], question: Question, answer: Answer
) -> Fault | None:
    if not answer.text:
        return "incomplete", None
    judged = any(resolve("reward", part["type"]).judges_correctness for part in rewards.values())
    keep = source.keep if isinstance(source, SampleSource) else "correct" if judged else "all"
    least = source.min_reward if isinstance(source, SampleSource) else {}
    section = (source.rewrite and source.rewrite.filters) or config.filters_of(source)
    whole = response(question, Sample([], [], answer.text, answer.finished, 0))
    reading = filters.Reading(question, whole, answer.finished, answer.tokens)
    bounds = {name: bound for name, bound in least.items() if name in rewards}
    return verdict(question, answer, rewards, keep, bounds) or filters.fault(reading, section)


def _replaced(one: Candidate, answer: Answer, made: dict[str, Any]) -> Candidate:
    told = {**made, "correct": answer.correct, "rewards": answer.rewards, "from": one.response}
    return replace(one, response=answer.text, provenance={**one.provenance, "rewritten": told})
