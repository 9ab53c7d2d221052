"""[conversation]: tools that a model calls within a response."""

from collections.abc import Mapping
from typing import Protocol

from pydantic import Field, PositiveFloat, PositiveInt

from megatron_r1.config.component import ToolComponent
from megatron_r1.config.section import Section
from megatron_r1.errors import nearest


class ConversationSection(Section):
    """[conversation]: responses of several turns, in which tools answer the model (docs/tools.md)."""

    tools: dict[str, ToolComponent] = Field(min_length=1)
    """Name -> tool. What a turn ends with is a call of the first one that takes it for one."""
    max_turns: PositiveInt = 4
    """How often the model speaks in one response at most; a call in the last turn has no reply, and the response counts
    as cut."""
    max_output_tokens: PositiveInt = 512
    """Of one reply; the rest of the tool's output is cut off."""
    timeout: PositiveFloat = 60.0
    """Seconds that one call may take; then the model is told that it has failed. A tool's own limits should be
    tighter: what runs in this process cannot be stopped, only left alone."""
    concurrency: PositiveInt = 16
    """Calls that run at the same time."""


class Asked(Protocol):
    """A section that questions come from."""

    @property
    def tools(self) -> list[str] | None:
        """Names in [conversation.tools]."""
        ...


def check_tools(conversation: ConversationSection | None, sections: Mapping[str, Asked]) -> None:
    """Raise ValueError if a section names a tool that the run does not have. `sections`: by their names."""
    known = conversation.tools if conversation else {}
    for section, part in sections.items():
        for name in part.tools or []:
            if name not in known:
                raise ValueError(
                    f"`tools` of [{section}] names {name!r}{nearest(name, known)}, which [conversation.tools] does not "
                    f"have; it has {', '.join(known) or 'none'}"
                )
