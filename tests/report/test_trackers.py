import socket
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_r1.errors import ConfigError


def curve(output: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_reads_the_steps_and_evaluations(open_report):
    with open_report(section={"tensorboard": True}) as report:
        report.evaluation(0, {"heldout_accuracy": 0.25})
        for step in range(3):
            with report.step(step):
                report.add({"loss": step + 0.5, "kl": float("nan")})
    assert curve(report.output, "loss") == [(0, 0.5), (1, 1.5), (2, 2.5)]
    assert curve(report.output, "heldout_accuracy") == [(0, 0.25)]


def test_tensorboard_forgets_the_steps_that_a_resumed_run_repeats(open_report):
    for first, value in ((0, 1.0), (2, 5.0)):
        with open_report(section={"tensorboard": True}, resume_step=first) as report:
            for step in range(first, 4):
                with report.step(step):
                    report.add({"loss": value})
    assert curve(report.output, "loss") == [(0, 1.0), (1, 1.0), (2, 5.0), (3, 5.0)]


@pytest.fixture
def no_account(monkeypatch, tmp_path):
    """No key anywhere; wandb's server is a port of ours, and the test fails if anything connects to it."""
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield
    with server, pytest.raises(BlockingIOError):
        server.accept()


def test_wandb_offline_needs_neither_account_nor_network(open_report, no_account):
    for first in (0, 1):
        with open_report(section={"wandb": "offline"}, resume_step=first) as report:
            for step in range(first, 2):
                with report.step(step):
                    report.add({"loss": 1.0})
            report.summary({"heldout_accuracy_final": 0.5})
    runs = list(report.output.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(runs) >= 1
    run_id = (report.output / "wandb_id").read_text()
    assert {path.name for path in runs} == {f"run-{run_id}.wandb"}
    assert b"heldout_accuracy_final" in runs[0].read_bytes()


def test_wandb_online_without_an_account_says_what_to_do(open_report, no_account):
    with pytest.raises(ConfigError, match="wandb login"), open_report(section={"wandb": "online"}):
        pass


def test_prometheus_fetches_the_newest_step(open_report):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with open_report(section={"prometheus_port": port}) as report:
        for step, value in ((0, 1.0), (1, 2.5)):
            with report.step(step):
                report.add({"loss": value, "accuracy/sums-2": 0.5, "fleet_idle": 0.25})
                report.add({"fleet_weights/engine-0": step, "fleet_weights/engine-1": step - 1})
        families = text_string_to_metric_families(httpx.get(f"http://127.0.0.1:{port}/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        found = {sample.name: sample for sample in samples}
        with pytest.raises(ConfigError, match="prometheus_port"), open_report(section={"prometheus_port": port}):
            pass
    assert (found["megatron_r1_step"].value, found["megatron_r1_loss"].value) == (1, 2.5)
    weights = {one.labels["engine"]: one.value for one in samples if one.name == "megatron_r1_fleet_weights"}
    assert weights == {"engine-0": 1, "engine-1": 0}
    assert found["megatron_r1_fleet_idle"].labels == {"run": report.output.name}
    assert found["megatron_r1_accuracy_sums_2"].labels == {"run": report.output.name}
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/metrics")
