"""What a source of documents is: `data generate` mixes several into one corpus."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_r1.config.section import Section


@dataclass(frozen=True)
class Document:
    """One text to read in pretraining."""

    prompt: str
    response: str
    """Continues the prompt as it stands, so it brings the white space between them."""
    style: str
    """What it is an example of; the corpus's summary counts these."""


class Source(ABC):
    """An endless stream of documents.

    A [sources.NAME] section names a subclass by `type`; `share` belongs to the corpus, the other keys fill `Config`.
    """

    class Config(Section):
        """The source's own keys of its section; a subclass with keys defines its own."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def documents(self, seed: int, exclude: frozenset[str]) -> Iterator[Document]:
        """Documents of stream `seed`, the same in every process.

        Args:
            seed: of the stream; another one gives other documents.
            exclude: bare texts of questions that no document may be about: the held-out ones.
        """
