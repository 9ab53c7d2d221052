"""What workers say they have got is compared, worker by worker, before an update is over."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_r1.rollout.fan_out import FanOut, Recipient, TransferError


class Said:
    """A client of an engine whose workers say these checksums."""

    def __init__(self, *sums: dict[str, str]) -> None:
        self.sums = list(sums)
        self.finished: list[int] = []

    def received(self) -> list[dict[str, str]]:
        return self.sums

    def finish_update(self, version: int) -> None:
        self.finished.append(version)


def fan_out(client: Said) -> FanOut:
    """Two workers, ranks 1 and 2, of whom the tensor "a" is asked."""
    engine = cast(Recipient, cast(Any, SimpleNamespace(name="engine-0", life=0, client=client)))
    made = FanOut([engine], [range(1, 3)], "nccl")
    made.version, made.sampled, made.sums = 7, ["a"], {"a": "0f", "b": "1e"}
    return made


def test_an_update_ends_when_all_workers_have_got_what_was_sent() -> None:
    client = Said({"a": "0f"}, {"a": "0f", "b": "other"})
    fan_out(client).finish_weight_update()
    assert client.finished == [7]


@pytest.mark.parametrize(
    ("sums", "message"),
    [
        ([{"a": "0f"}, {"a": "0e"}], "rank 2 has got a with checksum 0e, but 0f was sent"),
        ([{"a": "0f"}, {}], "rank 2 has got a with checksum None"),
        ([{"a": "0f"}], "1 of 2 workers say what they have got"),
        ([], "0 of 2 workers"),
        ([{"a": "0f"}] * 3, "3 of 2 workers"),
    ],
)
def test_what_differs_or_is_not_said_is_refused(sums: list[dict[str, str]], message: str) -> None:
    client = Said(*sums)
    with pytest.raises(TransferError, match=message) as refused:
        fan_out(client).finish_weight_update()
    assert list(refused.value.engines) == ["engine-0"]
    assert client.finished == []
