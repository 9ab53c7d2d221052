"""Run file of `megatron-r1 lm-eval`: tasks of EleutherAI's lm-evaluation-harness on a model behind vLLM."""

from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_r1.config.evaluation import ServedModelSection
from megatron_r1.config.section import Section


class TextServerSection(Section):
    """[rollout] of `lm-eval`: one vLLM server that takes and gives text; tasks and [generation] say how it samples."""

    port: PositiveInt = 8740
    """It listens on loopback."""
    max_model_len: PositiveInt
    """Longest prompt + response, tokens. The harness cuts longer prompts from the left."""
    max_tokens: PositiveInt = 256
    """Longest response, tokens, of a task that does not set its own `max_gen_toks`."""
    max_num_seqs: PositiveInt = 256
    """Sequences that it decodes at once."""
    kv_cache_gib: PositiveFloat = 0.5
    """KV cache on CPU, GiB."""
    threads: PositiveInt = 2
    """OpenMP threads on CPU."""
    start_timeout: PositiveFloat = 300.0
    """Seconds it may take to answer its first health check."""
    request_timeout: PositiveInt = 600
    """Seconds one request may take."""
    arguments: list[str] = []
    """More arguments for `vllm serve`, for example `["--tensor-parallel-size=8"]`."""

    @model_validator(mode="after")
    def _fits(self) -> "TextServerSection":
        if self.max_tokens >= self.max_model_len:
            raise ValueError(
                f"max_tokens {self.max_tokens} leaves no room for a prompt in max_model_len {self.max_model_len}"
            )
        return self


class LmEvalConfig(Section):
    """`megatron-r1 lm-eval`: what the other benchmarks of the field are measured with."""

    output: Path
    """Folder for `results.json`, and `lm_eval/` with the harness's own results, its samples and the responses from
    which a killed run goes on."""
    model: ServedModelSection
    tokenizer: Path | None = None
    """Default: the model folder."""
    rollout: TextServerSection
    tasks: list[str] = Field(min_length=1)
    """Names of tasks and groups; `python -m lm_eval ls tasks` lists those that the harness has."""
    include_path: Path | None = None
    """Folder of task files (YAML) of your own; paths in them are relative to where the command runs."""
    num_fewshot: NonNegativeInt | None = None
    """Solved examples before each question; default: the task's own."""
    limit: PositiveInt | None = None
    """Only the first questions of each task, to try things out."""
    apply_chat_template: bool = False
    """Ask through the tokenizer's chat template; examples become turns of the chat."""
    system_instruction: str | None = None
    add_bos_token: bool | None = None
    """Begin a prompt with the begin-of-sequence token, if the tokenizer has one. Default: yes, unless the chat template
    is applied, which holds it. False for perplexity (`loglikelihood_rolling`, such as wikitext): there the harness puts
    one before the text by itself, and would score the second."""
    generation: dict[str, Any] = {}
    """Overrides `generation_kwargs` of all tasks that generate: temperature, top_p, max_gen_toks, until, ..."""
    concurrency: PositiveInt = 64
    """Requests that wait for the server at once."""
    seed: int = 0
    """Of the choice of few-shot examples, of resampled standard errors, and of responses."""
