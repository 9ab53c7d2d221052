"""What workers have got is compared by each of them before an update is over, and one that says nothing is noticed."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from vllm.config import VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig

from megatron_r1.errors import EngineError
from megatron_r1.rollout.fan_out import FanOut, Recipient, TransferError
from megatron_r1.rollout.receiver import WeightReceiver

TENSOR, REPLICAS = 2, 2


def worker(replica: int, rank: int, received: dict[str, str]) -> WeightReceiver:
    """One of an engine of two data-parallel replicas with tensor parallelism, and checksums of what it has got."""
    place = SimpleNamespace(data_parallel_index=replica, world_size=TENSOR, rank=rank)
    config = cast(VllmConfig, SimpleNamespace(parallel_config=place, model_config=None))
    transfer, model = cast(WeightTransferConfig, None), cast(torch.nn.Module, None)
    made = WeightReceiver(transfer, config, torch.device("cpu"), model)
    made.received = received
    return made


class Said:
    """A client of such an engine, of which vLLM says what the first replica returns and what any worker raises."""

    def __init__(self, *sums: dict[str, str], silent: int = 0) -> None:
        places = [(replica, rank) for replica in range(REPLICAS) for rank in range(TENSOR)]
        self.engine = [worker(*place, received) for place, received in zip(places, sums, strict=True)]
        self.silent = silent
        self.finished: list[int] = []

    def workers(self, of_one_replica: bool = False) -> int:
        return TENSOR if of_one_replica else TENSOR * REPLICAS

    def compare(self, sums: Mapping[str, str], first: int) -> int:
        try:
            said = [one.compare(sums, first) for one in self.engine]
        except ValueError as error:
            raise EngineError(str(error)) from error
        return len(said) // REPLICAS - self.silent

    def finish_update(self, version: int) -> None:
        self.finished.append(version)


def fan_out(client: Said) -> FanOut:
    """Four workers, ranks 3 to 6, of whom the tensor "a" is asked."""
    engine = cast(Recipient, cast(Any, SimpleNamespace(name="engine-0", life=0, client=client)))
    made = FanOut([engine], [range(3, 7)], "nccl")
    made.version, made.sampled, made.sums = 7, ["a"], {"a": "0f", "b": "1e"}
    return made


def test_an_update_ends_when_all_workers_have_got_what_was_sent() -> None:
    client = Said({"a": "0f"}, {"a": "0f", "b": "other"}, {"a": "0f"}, {"a": "0f"})
    fan_out(client).finish_weight_update()
    assert client.finished == [7]


@pytest.mark.parametrize(
    ("sums", "silent", "message"),
    [
        (["0f", "0e", "0f", "0f"], 0, "rank 4 has got a with checksum 0e, but 0f was sent"),
        (["0f", "0f", "0f", "0e"], 0, "rank 6 has got a with checksum 0e, but 0f was sent"),
        (["0f", "0f", None, "0f"], 0, "rank 5 has got a with checksum None"),
        (["0f"] * 4, 1, "1 of 2 workers say"),
        (["0f"] * 4, 2, "0 of 2 workers"),
    ],
)
def test_what_differs_or_is_not_said_is_refused(sums: list[str | None], silent: int, message: str) -> None:
    client = Said(*({"a": one} if one else {} for one in sums), silent=silent)
    with pytest.raises(TransferError, match=message) as refused:
        fan_out(client).finish_weight_update()
    assert list(refused.value.engines) == ["engine-0"]
    assert client.finished == []
