"""The engines of several models, one model at a time: they start when they are needed and serve all who name them."""

from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_r1.config.collect import CollectConfig, DrawSection
from megatron_r1.config.evaluation import SamplingSection
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.rollout.engine import Engine
from megatron_r1.rollout.sampling import OpenEngine


class Fleets:
    """A context manager; another model's engines end before those of the next start, for memory holds one."""

    def __init__(self, config: CollectConfig, open_engine: OpenEngine) -> None:
        self._config = config
        self._open_engine = open_engine
        self._stack = ExitStack()
        self._running: tuple[str, Engine] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def opener(self, model: str) -> OpenEngine:
        """What gives a sampler the engines of a model; they outlive the sampler."""

        def opened(config: SamplingSection, output: Path, tokenizer: Tokenizer) -> AbstractContextManager[Engine]:
            return nullcontext(self._engine(model, tokenizer))

        return opened

    def _engine(self, model: str, tokenizer: Tokenizer) -> Engine:
        if self._running is None or self._running[0] != model:
            self._running = None
            self._stack.close()
            # As the model's own section has them: what a source samples otherwise goes with each batch.
            config = DrawSection(model=model).sampling(self._config.models[model])
            opened = self._open_engine(config, self._config.output / "engines" / model, tokenizer)
            self._running = (model, self._stack.enter_context(opened))
        return self._running[1]
