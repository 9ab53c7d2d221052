"""Sampled responses -> those worth keeping: right, readable, different, not too many to a question."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_r1.config.collect import CollectConfig, SampleSource
from megatron_r1.config.section import Component
from megatron_r1.curate import filters, layout
from megatron_r1.curate.asking import STOP, Asked
from megatron_r1.curate.candidates import Candidate, Ledger
from megatron_r1.curate.fleets import Fleets
from megatron_r1.data.overlap import bare
from megatron_r1.registry import resolve
from megatron_r1.reward.response import response
from megatron_r1.rollout.answers import Answer, digest
from megatron_r1.rollout.sampling import Sampler, sample_seed
from megatron_r1.seeds import stream_seed
from megatron_r1.types import Question, Sample

Fault = tuple[str, Any]
"""Why a response is dropped, and what was seen."""


class StoppingSampler(Sampler):
    """Cuts responses before the texts that their question names."""

    def edited(self, question: Question, sample: Sample) -> Sample:
        starts = [start for text in question.metadata.get(STOP, []) if (start := sample.text.find(text)) >= 0]
        if not starts:
            return sample
        text = sample.text[: min(starts)]
        return replace(sample, text=text, tokens=self.tokenizer.encode(text), finished=True)


class Selection:
    """Has the models of all sources answer, and selects.

    Args:
        config: of the run.
        fleets: the models' engines.
        ledger: what is dropped goes there.
    """

    def __init__(self, config: CollectConfig, fleets: Fleets, ledger: Ledger) -> None:
        self._config = config
        self._fleets = fleets
        self._ledger = ledger
        self._seen: set[str] = set()

    def sampled(self, name: str, section: SampleSource, asked: Sequence[Asked]) -> list[Candidate]:
        """What is selected of a source's responses, in the order of its questions.

        Raises:
            EngineError: the engines do not start or die.
        """
        config = self._config
        sampling = section.sampling(
            config.models[section.model],
            samples=section.samples,
            reward_models=config.reward_models,
            reward_workers=config.reward_workers,
            reward_timeout=config.reward_timeout,
            seed=stream_seed("collect", config.seed, name),
        )
        folder = config.output / "sampled" / name
        kept: list[Candidate] = []
        with StoppingSampler(sampling, folder, self._fleets.opener(section.model)) as sampler:
            room = sampling.rollout.max_model_len
            questions = [one for one in asked if len(sampler.tokenizer.encode_prompt(one.question.prompt)) < room]
            self._ledger.questions[name].update(asked=len(questions), no_room=len(asked) - len(questions))
            answers = sampler.answers(
                (one.question for one in questions), len(questions), section.rewards, section.data.task, section.samples
            )
            drawn = {
                "model": str(sampling.model.path),
                "temperature": sampling.rollout.temperature,
                "top_p": sampling.rollout.top_p,
                "template": section.data.template,
                "filters": filters.active(config.filters_of(section)),
            }
            for position, (one, (_, given)) in enumerate(zip(questions, answers, strict=True)):
                group = [
                    (_candidate(name, section, one, answer, {"sample": number, "seed": seed, **drawn}), answer)
                    for number, answer in enumerate(given)
                    for seed in [sample_seed(sampling, position, number)]
                ]
                kept += self._of_one_question(section, group)
        return kept

    def is_new(self, candidate: Candidate) -> bool:
        """Whether this is the first with its question and response; later ones are dropped."""
        key = digest(bare(candidate.question.metadata["text"]), candidate.messages or candidate.response)
        if key in self._seen:
            self._ledger.drop(candidate, "duplicate")
            return False
        self._seen.add(key)
        return True

    def _of_one_question(self, section: SampleSource, group: list[tuple[Candidate, Answer]]) -> list[Candidate]:
        passed: list[tuple[Candidate, Answer]] = []
        for candidate, answer in group:
            self._ledger.sampled(candidate, answer.correct)
            fault = self._fault(section, candidate, answer)
            if fault:
                self._ledger.drop(candidate, *fault)
            elif self.is_new(candidate):
                passed.append((candidate, answer))
        most = section.max_per_question or len(passed)
        if section.choose == "shortest":
            passed.sort(key=lambda pair: pair[1].tokens)
        elif section.choose == "random" and passed:
            random.Random(stream_seed("choose", self._config.seed, passed[0][0].question.id)).shuffle(passed)
        for candidate, _ in passed[most:]:
            self._ledger.drop(candidate, "more than max_per_question")
        return sorted((candidate for candidate, _ in passed[:most]), key=lambda one: int(one.provenance["sample"]))

    def _fault(self, section: SampleSource, candidate: Candidate, answer: Answer) -> Fault | None:
        fault = verdict(candidate.question, answer, section.rewards, section.keep, section.min_reward)
        reading = filters.Reading(candidate.question, candidate.response, answer.finished, answer.tokens)
        return fault or filters.fault(reading, self._config.filters_of(section))


def verdict(
    question: Question, answer: Answer, rewards: Mapping[str, Component], keep: str, least: Mapping[str, float]
) -> Fault | None:
    """Why rewards do not let a response pass; None where they do.

    A response is right if each reward that judges this, and applies to the question, has said so: one that gave no
    verdict, such as a judge that did not answer, leaves it "not judged".
    """
    applies = set(rewards) if question.rewards is None else set(question.rewards)
    judging = [n for n, part in rewards.items() if n in applies and resolve("reward", part["type"]).judges_correctness]
    needed = [*(judging if keep == "correct" else []), *(name for name in least if name in applies)]
    silent = [name for name in dict.fromkeys(needed) if answer.rewards.get(name) is None]
    if silent or (keep == "correct" and answer.correct is None):
        return "not judged", silent
    if keep == "correct" and not answer.correct:
        return "wrong", answer.final
    for name, bound in least.items():
        value = answer.rewards.get(name)
        if name in applies and value is not None and value < bound:
            return f"low {name}", value
    return None


def laid_out(candidates: Sequence[Candidate], form: str, ledger: Ledger) -> Iterator[Candidate]:
    """Candidates whose responses are as rows store them; one that lacks a part of the layout is dropped."""
    for candidate in candidates:
        values = layout.parts(candidate.question, candidate.response)
        lacking = layout.lacking(form, values)
        if lacking:
            ledger.drop(candidate, "incomplete", lacking)
            continue
        yield replace(candidate, response=layout.continuation(candidate.prompt, layout.fill(form, values)))


def _candidate(name: str, section: SampleSource, one: Asked, answer: Answer, drawn: dict[str, Any]) -> Candidate:
    return Candidate(
        source=name,
        domain=section.domain or one.question.member,
        question=one.question,
        prompt=one.prompt,
        response=response(one.question, Sample([], [], answer.text, answer.finished, 0)),
        provenance={
            **drawn,
            "examples": one.examples,
            "tokens": answer.tokens,
            "correct": answer.correct,
            "rewards": answer.rewards,
        },
    )
