"""Real vLLM servers against transformers, against themselves, and against bad luck."""

import random
import shutil
import threading
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from safetensors.torch import load_file

from megatron_r1.errors import DataError, EngineError
from megatron_r1.rollout.engine import SAMPLE_PATH
from megatron_r1.rollout.fleet import Fleet
from megatron_r1.types import Sample
from megatron_r1.weight_sync.named_tensors import NamedTensors
from megatron_r1.weight_sync.shared_memory import SharedMemorySync
from tests.processes import command_line
from tests.rollout.tiny_model import VOCABULARY, decode, free_port, rollout_section

Reference = Callable[[Path, list[int], list[int], float], torch.Tensor]


def make_prompts(count: int, seed: int) -> list[list[int]]:
    """Random token ids with one beginning for all of them, as a template gives, longer than a cache block."""
    draw = random.Random(seed)
    beginning = [1, *(draw.randrange(3, VOCABULARY) for _ in range(20))]
    return [beginning + [draw.randrange(3, VOCABULARY) for _ in range(draw.randrange(5, 40))] for _ in range(count)]


def bits(groups: list[list[Sample]]) -> list[list[tuple[list[int], list[float]]]]:
    return [[(sample.tokens, sample.logprobs) for sample in group] for group in groups]


def difference(
    reference: Reference, model: Path, prompts: list[list[int]], groups: list[list[Sample]], temperature: float
) -> torch.Tensor:
    """|engine - transformers| of every sampled token's log-probability, nats."""
    return torch.cat(
        [
            (reference(model, prompt, sample.tokens, temperature) - torch.tensor(sample.logprobs)).abs()
            for prompt, group in zip(prompts, groups, strict=True)
            for sample in group
        ]
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_transformers(
    fleets: tuple[Fleet, Fleet], models: tuple[Path, Path], reference: Reference, temperature: float
) -> None:
    prompts = make_prompts(8, seed=0)
    groups = fleets[0].sample(prompts, n=2, seed=3, temperature=temperature)
    found = difference(reference, models[0], prompts, groups, temperature)
    assert found.mean() <= 1e-5
    assert found.max() <= 1e-4


def test_shape_ends_and_text(fleets: tuple[Fleet, Fleet]) -> None:
    groups = fleets[0].sample(make_prompts(16, seed=1), n=8, seed=5)
    samples = [sample for group in groups for sample in group]
    assert [len(group) for group in groups] == [8] * 16
    for sample in samples:
        assert len(sample.tokens) == len(sample.logprobs) <= 40
        assert sample.finished == (sample.tokens[-1] == 2)
        assert 2 not in sample.tokens[:-1]
        assert sample.finished or len(sample.tokens) == 40
        assert sample.text == decode(sample.tokens)
    assert any(sample.finished for sample in samples)
    long = [tuple(sample.tokens) for sample in samples if len(sample.tokens) > 5]
    assert len(set(long)) == len(long) > 64, "two responses share a random stream"
    short = fleets[0].sample([[1, 5]], n=4, seed=0, max_tokens=3)[0]
    assert max(len(sample.tokens) for sample in short) == 3


def test_groups_arrive_as_they_are_complete(fleets: tuple[Fleet, Fleet]) -> None:
    """The same samples as in one batch, and the short ones are not kept waiting for the long ones."""
    fleet, prompts = fleets[0], make_prompts(64, seed=7)
    arrived = list(fleet.stream(prompts, n=1, seed=11))
    assert bits([dict(arrived)[index] for index in range(64)]) == bits(fleet.sample(prompts, n=1, seed=11))
    assert len(arrived) == 64
    lengths = [len(samples[0].tokens) for _, samples in arrived]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


def test_the_same_call_gives_the_same_bits(fleets: tuple[Fleet, Fleet]) -> None:
    """64 x 4 responses, three times, after other batches and while the server's processes are stopped at random."""
    fleet, prompts = fleets[0], make_prompts(64, seed=2)
    expected = bits(fleet.sample(prompts, n=4, seed=9))
    for attempt in range(2):
        fleet.sample(prompts[:5], n=3, seed=attempt)
        with interrupted(fleet, seed=attempt):
            assert bits(fleet.sample(prompts, n=4, seed=9)) == expected
    assert bits(fleet.sample(prompts, n=4, seed=10)) != expected


class interrupted:  # noqa: N801 (reads as a word in a with statement)
    """Stops and continues the server's processes at random moments."""

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self.processes = vllm_processes(fleet)
        self.draw = random.Random(seed)
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self) -> None:
        while not self.done.wait(self.draw.uniform(0.005, 0.03)):
            process = self.draw.choice(self.processes)
            process.suspend()
            time.sleep(self.draw.uniform(0.001, 0.03))
            process.resume()

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


def test_prompt_without_room_is_refused(fleets: tuple[Fleet, Fleet]) -> None:
    with pytest.raises(DataError, match=r"prompt 1 of the batch has 128 tokens.*max_model_len = 128"):
        fleets[0].sample([[1, 5], [5] * 128], n=2, seed=0)


def test_updated_engine_is_bitwise_a_fresh_one(
    fleets: tuple[Fleet, Fleet], models: tuple[Path, Path], reference: Reference, tmp_path: Path
) -> None:
    """The second server loaded from disk what the first is given in place; they are different processes, too."""
    updated, fresh = fleets
    prompts = make_prompts(64, seed=4)
    before = bits(updated.sample(prompts, n=4, seed=6))  # fills the prefix cache with the old weights' keys and values
    sync = SharedMemorySync(updated, tmp_path)
    assert sync.push(NamedTensors.of(load_file(models[1] / "model.safetensors")), version=7) > 0
    groups = updated.sample(prompts, n=4, seed=6)
    assert updated.version == 7
    assert {sample.weight_version for group in groups for sample in group} == {7}
    assert bits(groups) == bits(fresh.sample(prompts, n=4, seed=6)) != before
    assert difference(reference, models[1], prompts[:8], groups[:8], 1.0).mean() <= 1e-5
    sync.push(NamedTensors.of(load_file(models[0] / "model.safetensors")), version=8)
    assert bits(updated.sample(prompts, n=4, seed=6)) == before


def test_two_engines_answer_as_one(models: tuple[Path, Path], reference: Reference, tmp_path: Path) -> None:
    """Order of the prompts, an engine without a share, and an update of both."""
    section = rollout_section(free_port()).model_copy(update={"engines": 2})
    with Fleet(section, models[0], tmp_path, "float32", decode) as fleet:
        assert len(vllm_processes(fleet)) >= 2
        for count in (5, 1):
            prompts = make_prompts(count, seed=4)
            groups = fleet.sample(prompts, n=2, seed=1)
            assert [len(group) for group in groups] == [2] * count
            assert difference(reference, models[0], prompts, groups, 1.0).mean() <= 1e-5
        fleet.update_weights(models[1] / "model.safetensors", version=7)
        prompts = make_prompts(4, seed=5)
        groups = fleet.sample(prompts, n=2, seed=2)
        assert {sample.weight_version for group in groups for sample in group} == {7}
        assert difference(reference, models[1], prompts, groups, 1.0).mean() <= 1e-5
        killed_in_the_middle(fleet, models[1], reference)


def killed_in_the_middle(fleet: Fleet, model: Path, reference: Reference) -> None:
    """Once while both have a share of a batch, and once while the scheduler feeds both."""
    prompts = make_prompts(64, seed=6)
    prompts[0] += [5] * (fleet.section.max_model_len - 3 - len(prompts[0]))  # ends long before the others
    expected = bits(fleet.sample(prompts, n=2, seed=3, max_tokens=64))
    assert bits(with_a_kill(fleet, prompts)) == expected
    fleet.feed("continuous")
    groups = with_a_kill(fleet, prompts)
    assert [len(group) for group in groups] == [2] * 64
    assert {sample.weight_version for group in groups for sample in group} == {7}
    assert difference(reference, model, prompts[:8], groups[:8], 1.0).mean() <= 1e-5
    figures = fleet.figures()
    assert figures["engines_lost"] == 2
    assert figures["engines_returned"] >= 1
    assert 64 < figures["samples_again"] <= 64 + 128, "a share, then what was left of the groups that it had"


def with_a_kill(fleet: Fleet, prompts: list[list[int]]) -> list[list[Sample]]:
    """The first engine's server dies when the first group is there."""
    marker = f"--port={fleet.section.port}"
    server = next(process for process in vllm_processes(fleet) if marker in command_line(process))
    stream = fleet.stream(prompts, n=2, seed=3, max_tokens=64)
    answers = dict([next(stream)])
    server.kill()
    answers |= dict(stream)
    return [answers[index] for index in range(len(prompts))]


def test_port_in_use_is_named(fleets: tuple[Fleet, Fleet], models: tuple[Path, Path], tmp_path: Path) -> None:
    port = fleets[0].section.port
    with pytest.raises(EngineError, match=f"port {port} .*in use.*rollout.port"):
        Fleet(rollout_section(port), models[0], tmp_path, "float32", decode)


def test_death_at_start_shows_the_log(models: tuple[Path, Path], tmp_path: Path) -> None:
    """No weights: the engine core dies, and the cause stands far above the end of the log."""
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(models[0] / "config.json", folder)
    with pytest.raises(EngineError, match=r"(?s)has died.*engine-0.log.*first error.*Cannot find any model weights"):
        Fleet(rollout_section(free_port()), folder, tmp_path, "float32", decode)


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"config\.json"):
        Fleet(rollout_section(free_port()), tmp_path, tmp_path, "float32", decode)


def test_one_group_at_a_time(fleets: tuple[Fleet, Fleet], models: tuple[Path, Path], reference: Reference) -> None:
    """The scheduler's way to the same engine: the tokens' log-probabilities stay right, and streams stay apart."""
    prompts = make_prompts(12, seed=8)
    batch = fleets[0].sample(prompts, n=3, seed=13)
    fleets[0].feed("continuous")
    groups = fleets[0].sample(prompts, n=3, seed=13)
    fleets[0].feed("batch")
    assert [len(group) for group in groups] == [3] * 12
    assert difference(reference, models[0], prompts, groups, 1.0).mean() <= 1e-5
    pairs = zip(chain(*batch), chain(*groups), strict=True)
    same = [one.tokens == other.tokens for one, other in pairs]
    assert sum(same) >= 30, "the seeds are the same; only the last bits of sums may move a token"


def test_nothing_without_the_token(fleets: tuple[Fleet, Fleet]) -> None:
    """vLLM's routes that load, pause and sleep, and ours."""
    url = f"http://127.0.0.1:{fleets[0].section.port}"
    for path in ("/pause", "/resume", "/update_weights", "/collective_rpc", "/sleep", "/v1/completions", SAMPLE_PATH):
        assert httpx.post(url + path, json={}).status_code == 401
    assert httpx.get(url + "/health").status_code == 200


def test_killed_engine_core_is_replaced(fleets: tuple[Fleet, Fleet], models: tuple[Path, Path], tmp_path: Path) -> None:
    """With the weights that were pushed last, bit for bit; stands last, and its processes end with the fleet."""
    fleet = fleets[1]
    SharedMemorySync(fleet, tmp_path).push(NamedTensors.of(load_file(models[0] / "model.safetensors")), version=5)
    prompts = make_prompts(64, seed=3)
    expected = bits(fleet.sample(prompts, n=4, seed=1))
    processes = vllm_processes(fleet)
    core = next(process for process in processes if "EngineCore" in " ".join(command_line(process)))
    core.suspend()  # however fast it is, it dies before its first answer
    threading.Timer(1.0, core.kill).start()
    answers = dict(fleet.stream(prompts, n=4, seed=1))
    assert bits([answers[index] for index in range(64)]) == expected
    figures = fleet.figures()
    assert (figures["engines_lost"], figures["engines_returned"], figures["samples_again"]) == (1, 1, 256)
    processes += vllm_processes(fleet)
    fleet.close()
    deadline = time.monotonic() + 120
    while any(map(alive, processes)):  # killed they are; on a busy machine the kernel may take its time
        assert time.monotonic() < deadline, [process for process in processes if alive(process)]
        time.sleep(0.1)


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def vllm_processes(fleet: Fleet) -> list[psutil.Process]:
    """Everything below the fleet's supervisors."""
    mine = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    marker = f"--port={fleet.section.port}"
    supervisors = [process for process in mine if marker in command_line(process)]
    return [process for supervisor in supervisors for process in supervisor.children(recursive=True)]
