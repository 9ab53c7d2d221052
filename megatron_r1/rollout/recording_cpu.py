"""Runs inside vLLM on CPU: records which experts tokens went to, with vLLM's own recorder, in its older model runner.

vLLM 0.32 records them in Model Runner V2 alone (`--enable-return-routed-experts`), which needs Triton, and Triton has
no CPU. Its recorder, its store beside the prefix cache and its way through the scheduler know nothing of the runner;
they are called here where the new runner calls them. Can go when vLLM on CPU takes that option by itself.

Stands in for `vllm.entrypoints.openai.api_server` on the command line, and for `receiver.Receiver` in the workers.
"""

from typing import Any

import numpy as np
from vllm.config import VllmConfig
from vllm.distributed.aux_output_connector.worker import AuxOutputWorkerConnector, PendingAuxOutput
from vllm.platforms.interface import Platform
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from megatron_r1.rollout.receiver import Receiver


class RecordingRunner(CPUModelRunner):
    """The runner with the calls that Model Runner V2 has."""

    _connector: AuxOutputWorkerConnector | None = None
    _pending: PendingAuxOutput | None = None
    _drafted: dict[str, int]
    """Tokens that each request's draft model has proposed for the step."""

    def initialize_kv_cache(self, kv_cache_config: Any, is_profiling: bool = False, **options: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, is_profiling, **options)
        if not is_profiling:
            self._connector = AuxOutputWorkerConnector(
                vllm_config=self.vllm_config, model=self.model, kv_cache_config=self.kv_cache_config
            )

    def execute_model(self, scheduler_output: SchedulerOutput, *arguments: Any) -> Any:
        assert self._connector is not None
        self._connector.begin_step(scheduler_output.aux_output_connector_metadata)
        output = super().execute_model(scheduler_output, *arguments)
        if scheduler_output.total_num_scheduled_tokens:
            self._pending = self._connector.prepare_output(_Batch(self.input_batch, scheduler_output))
            drafts = scheduler_output.scheduled_spec_decode_tokens
            self._drafted = {request: len(tokens) for request, tokens in drafts.items()}
        return output

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        if self._pending is not None:
            assert isinstance(output, ModelRunnerOutput), "vLLM schedules asynchronously on CPU, too"
            pending, self._pending = self._pending, None
            sampled = [len(output.sampled_token_ids[output.req_id_to_index[name]]) for name in pending.request_ids]
            drafted = [self._drafted.get(name, 0) for name in pending.request_ids]
            rejected = [max(0, more + 1 - got) if more else 0 for got, more in zip(sampled, drafted, strict=True)]
            pending.enqueue_cpu_copy(np.array(sampled), np.array(rejected))
            output.aux_output_connector_output = pending.process_output()
        return output


class _Batch:
    """What the recorder asks of a step's batch."""

    def __init__(self, batch: Any, step: SchedulerOutput) -> None:
        self.req_ids = list(batch.req_ids)
        counts = [step.num_scheduled_tokens[name] for name in self.req_ids]
        self.query_start_loc_np = np.concatenate([[0], np.cumsum(counts)])
        self.num_computed_tokens_np = batch.num_computed_tokens_cpu[: len(counts)].copy()


class RecordingReceiver(Receiver):
    """Worker extension: naming it makes the workers import this module, which gives them the runner."""


def allow() -> None:
    """Let vLLM's check of the option pass with this runner: it leaves that to platforms with runners of their own."""
    check = VllmConfig._verify_aux_output_compatibility

    def verify(config: VllmConfig) -> None:
        in_tree = Platform.is_out_of_tree
        Platform.is_out_of_tree = lambda _: True
        try:
            check(config)
        finally:
            Platform.is_out_of_tree = in_tree

    VllmConfig._verify_aux_output_compatibility = verify


allow()
cpu_worker.CPUModelRunner = RecordingRunner

if __name__ == "__main__":
    from vllm.entrypoints.launchers.api_server.entry import main

    main()
