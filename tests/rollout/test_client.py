"""Calls that a server does not answer, or not soon."""

from pathlib import Path

import pytest

from megatron_r1.rollout import client
from tests.rollout.test_engine_faults import PROMPTS, Open, expected, opened, push, tokens  # noqa: F401


def test_a_core_that_dies_in_a_call_is_noticed(
    opened: Open,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The server lives on and never answers: not to be waited for until `transfer_timeout`."""
    monkeypatch.setattr(client, "WATCH_SECONDS", 0.1)
    fleet = opened(engines=1, dispatch="continuous", transfer_timeout=120.0)
    fleet.breaks(0, "core_dies")
    push(fleet, tmp_path, 2)
    assert "died during /start_weight_update (its core is dead" in caplog.text
    assert tokens(fleet.sample(PROMPTS, n=2, seed=3)) == expected(2, 3, 2)
    assert fleet.figures()["engines_lost"] == fleet.figures()["engines_returned"] == 1


def test_an_answer_may_take_long_where_the_server_is_healthy(
    opened: Open,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is given when the server has been looked at five times."""
    monkeypatch.setattr(client, "WATCH_SECONDS", 0.01)
    fleet = opened(engines=1)
    waits, looks, lost = tmp_path / f"{fleet.section.port}.waits", list[bool](), client.Client.lost

    def counted(self: client.Client) -> bool:
        found = lost(self)
        if waits.exists():
            looks.append(found)
        if len(looks) >= 5:
            waits.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(client.Client, "lost", counted)
    fleet.breaks(0, "wait")
    push(fleet, tmp_path, 2)
    assert len(looks) >= 5
    assert not any(looks)
    assert fleet.figures()["engines_lost"] == 0
