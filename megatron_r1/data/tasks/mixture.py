"""Several tasks as one, in given shares."""

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

from pydantic import AfterValidator, Field, PositiveFloat

from megatron_r1.config import component
from megatron_r1.config.load import validate
from megatron_r1.config.section import Component, Section
from megatron_r1.data.tasks.base import Problem, Task
from megatron_r1.data.tasks.shares import Shares
from megatron_r1.data.templates import render
from megatron_r1.errors import ConfigError
from megatron_r1.registry import resolve
from megatron_r1.seeds import stream_seed
from megatron_r1.types import Question


class Member(Section):
    """What the mixture reads of a member's section; the other keys are the member task's own."""

    weight: PositiveFloat = 1.0
    """Share of the questions, relative to the other members' weights."""
    template: str | None = None
    """Prompt template; None = that of the run, else the task's own."""
    rewards: list[str] | None = None
    """Names in [rewards] that score its questions; None = the names of its task's default rewards."""


def _split(section: dict[str, Any]) -> tuple[Member, Component]:
    own = {key: section[key] for key in Member.model_fields if key in section}
    return validate(Member, own, where="a member"), {key: part for key, part in section.items() if key not in own}


def _completed(section: dict[str, Any]) -> dict[str, Any]:
    member, task = _split(section)
    if isinstance(task.get("type"), str) and issubclass(resolve("task", task["type"]), Mixture):
        raise ConfigError("a mixture within a mixture: list its members in the outer one")
    return component.complete("task", task) | member.model_dump(mode="json", exclude_none=True)


class Mixture(Task):
    """Members under names of the run file's own choice, each a task section with the keys of `Member` beside it.

    A question carries its member's section, so that it is scored as if the member were the run's only task.
    """

    class Config(Section):
        tasks: dict[str, Annotated[dict[str, Any], AfterValidator(_completed)]] = Field(min_length=1)
        """Name -> task section with `weight`, `template` and `rewards`."""

    def __init__(self, config: Config) -> None:
        """Raises ConfigError where members' default rewards have one name and different sections."""
        super().__init__(config)
        parts = {name: _split(section) for name, section in config.tasks.items()}
        self._members = {name: member for name, (member, _) in parts.items()}
        self._sections = {name: section for name, (_, section) in parts.items()}
        self.tasks: dict[str, Task] = {name: component.build("task", part) for name, part in self._sections.items()}
        self._shares = Shares({name: member.weight for name, member in self._members.items()})
        for member in self._members.values():
            if member.template is not None:
                render(member.template, "")  # a wrong name is better found now
        self.default_rewards = _union(self.tasks)  # type: ignore[misc]  # of these members, not of the class

    @property
    def name(self) -> str:
        return "mixture"

    def problem(self, seed: int, index: int) -> Problem:
        name, number = self._shares.place(seed, index)
        return self._labelled(name, self.tasks[name].problem(stream_seed("member", seed, name), number))

    def stream(self, seed: int, exclude: frozenset[str]) -> Callable[[int], Problem]:
        """See `Task.stream`. Each member has a stream of its own, so the shares stay what they are."""
        streams = {name: task.stream(stream_seed("member", seed, name), exclude) for name, task in self.tasks.items()}

        def problem(index: int) -> Problem:
            name, number = self._shares.place(seed, index)
            return self._labelled(name, streams[name](number))

        return problem

    def reward_names(self) -> frozenset[str]:
        return frozenset(reward for name in self.tasks for reward in self._scored_by(name))

    def _scored_by(self, name: str) -> tuple[str, ...]:
        rewards = self._members[name].rewards
        return tuple(self.tasks[name].default_rewards if rewards is None else rewards)

    def _labelled(self, name: str, problem: Problem) -> Problem:
        """A member's problem with all that its question has to carry."""
        member, names = self._members[name], self._scored_by(name)
        return replace(
            problem,
            metadata={**problem.metadata, "member": name},
            task=problem.task or self._sections[name],
            template=member.template or problem.template,
            rewards=names if member.rewards is not None or problem.rewards is None else problem.rewards,
        )

    def verify(self, question: Question, answer: str) -> float:
        return self.tasks[question.metadata["member"]].verify(question, answer)


def _union(tasks: dict[str, Task]) -> dict[str, Component]:
    """The default rewards of all members."""
    union: dict[str, Component] = {}
    for name, task in tasks.items():
        for reward, section in task.default_rewards.items():
            if union.setdefault(reward, section) != section:
                raise ConfigError(
                    f"mixture: {name!r} and another member both have a default reward {reward!r}, with different "
                    f"settings ({section} and {union[reward]}); their tasks have to give them different names"
                )
    return union
