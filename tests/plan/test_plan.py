"""The whole verb: figures, findings, search, the page and the proof."""

import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.distributed.weight_transfer import packed_tensor

from megatron_r1.config.plan import PlanConfig
from megatron_r1.config.sections import ModelSection, ParallelSection
from megatron_r1.errors import ConfigError
from megatron_r1.model.fp8 import quantization_config
from megatron_r1.model.memory import Shape, Work, predict
from megatron_r1.plan.hardware import H100
from megatron_r1.plan.memory import MemoryPlan, Setting, packed
from megatron_r1.plan.state import Precision, States
from megatron_r1.plan.verb import run
from tests.model.conftest import MODEL

ROOT = Path(__file__).parents[2]
PRETRAIN = ROOT / "examples/deepseek_v3/pretrain.toml"
EXTEND = ROOT / "examples/deepseek_v3/extend_32k.toml"
"""The same in bfloat16."""
HERE = [f"--model.path={ROOT / 'examples/deepseek_v3/model'}"]
PIPELINE = ["--parallel.pipeline=2", "--parallel.pipeline_layout=Ett|tL"]
TINY_RL = f"""
output = "runs/x"
steps = 10
questions = 8
group_size = 4
minibatches = 2
tokens_per_microbatch = 512
[model]
path = "{MODEL}"
[data]
task = {{ type = "math", source = "x.jsonl" }}
[heldout]
task = {{ type = "math", source = "x.jsonl" }}
[optim]
lr = 1e-6
[rollout]
max_model_len = 256
max_tokens = 128
"""


def planned(capsys: pytest.CaptureFixture[str], overrides: list[str], **options: Any) -> dict[str, Any]:
    run(PlanConfig(**options), overrides, as_json=True)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_deepseek_v3_as_it_was_trained(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    found = planned(capsys, HERE, run_file=PRETRAIN, gpus=2048, html=page)
    assert found["parameters"] == 671_026_419_200
    assert found["flops_per_token"] == pytest.approx(260.64e9, rel=1e-4)
    assert sum(rank["ranks"] for rank in found["memory"]) == 2048
    assert found["microbatches"] == 15360 // 128
    assert found["update"]["tokens"] == 15360 * 4096
    assert found["gpu_hours"] == pytest.approx(14.8e12 / found["update"]["tokens_per_second_per_gpu"] / 3600)
    assert found["fits"]
    text = page.read_text()
    assert text.count('class="rank"') == len(found["memory"])
    assert "<script" not in text


def test_deepseek_v3_with_nothing_recomputed_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(
        capsys,
        [*HERE, "--model.memory.recompute=none", "--model.memory.recompute_modules=[]"],
        run_file=PRETRAIN,
        gpus=2048,
    )
    assert not found["fits"]
    assert "does not fit" in {finding["kind"] for finding in found["findings"]}


def test_an_illegal_layout_has_no_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(PlanConfig(run_file=PRETRAIN, gpus=1000), HERE, as_json=True) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["memory"] == []
    assert "1,000 GPUs do not divide by expert 64" in " ".join(finding["text"] for finding in found["findings"])


def test_a_search_finds_what_fits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small = tmp_path / "run.toml"
    small.write_text(TINY_RL)
    found = planned(capsys, [], run_file=small, gpus=8, search=True)["search"]
    assert found
    seconds = [row["step_seconds"] for row in found]
    assert seconds == sorted(seconds)
    assert max(row["peak_bytes"] for row in found) <= H100.memory
    for row in found:
        assert 8 % (row["tensor"] * row["pipeline"]) == 8 % (row["expert"] * row["pipeline"]) == 0


def test_rl_has_a_fleet_and_a_reference(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small = tmp_path / "run.toml"
    small.write_text(TINY_RL)
    found = planned(capsys, [], run_file=small, gpus=2, mean_tokens=100, price=2.0)
    assert found["verb"] == "rl"
    assert found["gpus"] == found["trainer_gpus"] + 1 == 3
    rank = found["memory"][0]
    assert rank["host"]["reference policy"] == rank["parts"]["weights"]
    assert rank["peaks"]["score"] > 0
    parts = found["update"]["seconds"] * 2 + found["scoring_seconds"]
    assert found["step_seconds"] == pytest.approx(
        parts + found["rollout"]["rollout_seconds"] + found["rollout"]["sync"]["seconds"]
    )
    assert found["cost"] == pytest.approx(2 * found["gpu_hours"])
    assert found["gpu_hours"] == pytest.approx(found["step_seconds"] * 10 * 3 / 3600)


def test_engines_in_fp8_hold_and_are_sent_half(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small = tmp_path / "run.toml"
    small.write_text(TINY_RL)
    plain, eight = (
        planned(capsys, ["--model.dtype=bfloat16", *more], run_file=small, gpus=1)
        for more in ([], ["--rollout.fp8_path=models/fp8"])
    )
    assert eight["rollout"]["weights"] == plain["rollout"]["weights"] / 2
    assert 0.5 < eight["rollout"]["sync"]["bytes"] / plain["rollout"]["sync"]["bytes"] < 0.7
    name = "weights for the engines"
    assert eight["host"][name] / plain["host"][name] == pytest.approx(
        eight["rollout"]["sync"]["bytes"] / plain["rollout"]["sync"]["bytes"]
    )


def test_the_table_says_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small = tmp_path / "run.toml"
    small.write_text(TINY_RL)
    assert run(PlanConfig(run_file=small, gpus=1), ["--rollout.engines=2"], as_json=False) == 0
    text = capsys.readouterr().out
    assert "on 1 GPU and 2 of the fleet" in text
    for word in ("weights", "gradients", "at train", "at score", "rollout", "training alone"):
        assert word in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('output = "x"', "only recipes and run files of pretrain, sft, rl, reward-model, dpo"),
        (TINY_RL.replace("[data]", "[model.lora]\nrank = 4\n[data]"), "model.lora"),
        (TINY_RL + '[advantage]\ntype = "gae"\n[critic.optim]\nlr = 1e-5\n', r"\[critic\]"),
    ],
)
def test_what_cannot_be_planned(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        run(PlanConfig(run_file=tmp_path / "run.toml"), [], as_json=True)


def test_activations_by_layer_add_up() -> None:
    """To what `model/memory.py`, which is measured against autograd, says of the whole rank."""
    hf = json.loads((ROOT / "examples/deepseek_v3/model/config.json").read_text())
    own = ParallelSection(pipeline=8, virtual_pipeline=4, pipeline_layout="Et|(tt|)*30mL", tensor=2, expert=8)
    shape, work = Shape.of(hf, ModelSection(path=Path())), Work(256, 1, 4096, 64)
    states = States(shape, own, 256, Precision())
    for rank in MemoryPlan(shape, own, work, Setting(), H100).ranks(states):
        whole = predict(shape, own, work, rank.stage)
        assert rank.activation_total == pytest.approx(whole.activations)
        assert rank.weights == pytest.approx(whole.weights)


def test_a_proof(tmp_path: Path) -> None:
    """In a process of its own, as the command runs it."""
    small = tmp_path / "run.toml"
    small.write_text(TINY_RL)
    code = f"""
from pathlib import Path
from megatron_r1.config.plan import PlanConfig
from megatron_r1.plan.verb import run
options = PlanConfig(run_file=Path({str(small)!r}), gpus=12, prove=True)
raise SystemExit(run(options, ["--parallel.pipeline=3", "--parallel.expert=2"], True))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    proof = json.loads(done.stdout)["proof"]
    assert len(proof) >= 3
    assert all(row["equal"] for row in proof)


def test_what_can_be_proved_is_named() -> None:
    """What is in the run file, and no more."""
    low = ["--optim.gradients=bfloat16", "--optim.offload=0.5"]
    refused = r"prove it with --optim\.moments=float32 --optim\.gradients=float32 --optim\.offload=0 at"
    with pytest.raises(ConfigError, match=refused):
        run(PlanConfig(run_file=PRETRAIN, gpus=2048, prove=True), [*HERE, *low], as_json=True)


PREFERENCES = f"""
output = "runs/x"
data = ["x.jsonl"]
heldout_share = 0.1
max_length = 128
batch = 8
epochs = 2
tokens_per_microbatch = 512
[model]
path = "{MODEL}"
"""


@pytest.mark.parametrize(("keys", "verb", "texts"), [("", "dpo", 2), ('kind = "pointwise"\n', "reward-model", 1)])
def test_preferences(keys: str, verb: str, texts: int, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small = tmp_path / "run.toml"
    small.write_text(keys + PREFERENCES)
    found = planned(capsys, [], run_file=small, gpus=1, mean_tokens=64, samples=80)
    assert (found["verb"], found["steps"]) == (verb, 20)
    assert found["update"]["tokens"] == max(512, 8 * texts * 64)
    assert (found["scoring_seconds"] > 0) == (verb == "dpo")
    assert found["model"].endswith("ForSequenceClassification" if verb == "reward-model" else "ForCausalLM")


def test_a_reward_model_is_proved(tmp_path: Path) -> None:
    small = tmp_path / "run.toml"
    small.write_text('kind = "pairwise"\n' + PREFERENCES)
    code = f"""
from pathlib import Path
from megatron_r1.config.plan import PlanConfig
from megatron_r1.plan.verb import run
raise SystemExit(run(PlanConfig(run_file=Path({str(small)!r}), gpus=2, prove=True), ["--parallel.expert=2"], True))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert all(row["equal"] for row in json.loads(done.stdout)["proof"])


def test_what_the_run_file_says_of_numbers_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes of a number: 2 + 4 + 12 as it stands, 2 + 2 + 6 with gradients and moments in bfloat16, half of it away."""
    plain = planned(capsys, HERE, run_file=EXTEND, gpus=2048)["memory"][1]["parts"]
    low = ["--optim.gradients=bfloat16", "--optim.moments=bfloat16"]
    lower = planned(capsys, [*HERE, *low], run_file=EXTEND, gpus=2048)["memory"][1]["parts"]
    assert lower["weights"] == plain["weights"]
    assert lower["gradients"] * 2 == plain["gradients"]
    assert lower["optimizer"] * 12 == plain["optimizer"] * 6
    away = planned(capsys, [*HERE, "--optim.offload=0.5"], run_file=EXTEND, gpus=2048)
    assert away["memory"][1]["parts"]["optimizer"] == plain["optimizer"] / 2
    assert away["memory"][1]["host"]["optimizer"] == plain["optimizer"] / 2 * 16 / 12
    eight = planned(capsys, [*HERE, "--model.fp8.recipe=blockwise"], run_file=EXTEND, gpus=2048)
    assert eight["memory"][1]["parts"]["buffers"] > plain["weights"] * 0.95
    assert eight["update"]["parts"]["products"] < 0.9 * planned(capsys, HERE, run_file=EXTEND, gpus=2048)["update"][
        "parts"]["products"]  # fmt: skip


def test_what_the_kernels_refuse_is_illegal(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["--model.kernels.overlap_expert_exchange=true"]
    run(PlanConfig(run_file=EXTEND, gpus=2048), [*HERE, *wrong], as_json=True)
    texts = [one["text"] for one in json.loads(capsys.readouterr().out)["findings"] if one["kind"] == "illegal"]
    assert any("overlap_expert_exchange with a pipeline of whole stages" in text for text in texts)


def test_a_fleet_that_runs_ahead_hides_the_shorter_part(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small = tmp_path / "run.toml"
    small.write_text(TINY_RL)
    ahead = ["--rollout.max_staleness=1", "--rollout.dispatch=continuous"]
    at_once, one_by_one = (planned(capsys, more, run_file=small, gpus=1) for more in (ahead, []))
    fleet = at_once["rollout"]["rollout_seconds"] + at_once["rollout"]["sync"]["seconds"]
    own = at_once["update"]["seconds"] * 2 + at_once["scoring_seconds"]
    assert at_once["step_seconds"] == pytest.approx(max(fleet, own))
    assert one_by_one["step_seconds"] == pytest.approx(fleet + own)


def test_each_longest_response_has_its_share_of_the_steps(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small = tmp_path / "run.toml"
    small.write_text(TINY_RL)

    def rollout(longest: str) -> dict[str, float]:
        given = ["--rollout.max_model_len=1024", f"--rollout.max_tokens={longest}"]
        found = planned(capsys, given, run_file=small, gpus=1, mean_tokens=336, spread=1.5)
        return {name: found["rollout"][name] for name in ("rollout_seconds", "tail_seconds", "tokens_per_second")}

    short, long = rollout("128"), rollout("512")
    both = rollout("[{ value = 128, until_step = 7 }, { value = 512 }]")
    assert short["rollout_seconds"] < long["rollout_seconds"]
    for name in ("rollout_seconds", "tail_seconds"):
        assert both[name] == pytest.approx(0.7 * short[name] + 0.3 * long[name])
    tokens = [share * one["tokens_per_second"] * one["rollout_seconds"] for share, one in ((0.7, short), (0.3, long))]
    assert both["tokens_per_second"] * both["rollout_seconds"] == pytest.approx(sum(tokens))


def test_an_actor_in_fp8_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """As the run itself does."""
    hf = json.loads((MODEL / "config.json").read_text()) | {"quantization_config": quantization_config()}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    small = tmp_path / "run.toml"
    small.write_text(TINY_RL.replace(str(MODEL), str(tmp_path)))
    assert run(PlanConfig(run_file=small, gpus=1), [], as_json=True) == 1
    [finding] = [one for one in json.loads(capsys.readouterr().out)["findings"] if one["kind"] == "illegal"]
    assert f"`megatron-r1 cast {tmp_path} FOLDER`" in finding["text"]


def test_weights_through_files_are_on_the_host(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """In shared memory twice, on the first node; on their way to storage each node has its share of them."""
    small = tmp_path / "run.toml"
    small.write_text(TINY_RL)

    def sync(transport: str, gpus: int) -> tuple[float, dict[str, float]]:
        made = planned(capsys, [f"--rollout.transport={transport}"], run_file=small, gpus=gpus)
        assert made["host"]["weights for the engines"] == made["rollout"]["sync"]["host"]
        return made["host"]["weights for the engines"], made["rollout"]["sync"]

    size = sync("disk", 1)[1]["bytes"]
    assert [sync("shared_memory", gpus)[0] for gpus in (1, 16)] == [2 * size] * 2
    assert [sync("disk", gpus)[0] for gpus in (1, 8, 16, 32)] == [size, size, size / 2, size / 4]
    for gpus in (8, 32):
        link, storage = size / gpus / H100.host_link, size / H100.storage
        assert sync("disk", gpus)[1]["seconds"] == pytest.approx(link + storage * (8 / gpus + 1))


def test_what_weights_are_packed_in_counts_at_sync(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """On the first rank alone, which NCCL has in one more group; a buffer of CUDA IPC grows to a larger tensor.

    By "disk" whole tensors are put together where parts are: with tensor parallelism on all ranks, else on none.
    """
    small = tmp_path / "run.toml"
    small.write_text(TINY_RL)
    gib = 2**30

    def peaks(transport: str, buffer: float, *layout: str, gpus: int = 3) -> list[float]:
        own = [f"--rollout.transport={transport}", f"--rollout.transfer_buffer_gib={buffer}"]
        found = planned(capsys, [*own, *(layout or ["--parallel.pipeline=3"])], run_file=small, gpus=gpus)
        return [rank["peaks"]["sync"] for rank in found["memory"]]

    file, nccl, ipc, tiny = peaks("shared_memory", 2.0), peaks("nccl", 2.0), peaks("ipc", 2.0), peaks("ipc", 1e-9)
    assert len(file) == 3
    assert file[1:] == nccl[1:] == ipc[1:]
    kept = 1 + H100.lost
    largest = 400 * 64 * 2  # the embedding of r1_tiny in bfloat16
    assert (nccl[0] - file[0] - H100.communicator) / kept == pytest.approx(3 * (2 * gib + largest))
    assert (ipc[0] - tiny[0]) / kept == pytest.approx(2 * gib - largest)
    disk = peaks("disk", 2.0)
    assert disk[1:] == file[1:]
    assert (file[0] - disk[0]) / kept == pytest.approx(largest)
    cut = ["--parallel.tensor=2", "--parallel.pipeline=3"]
    assert peaks("disk", 2.0, *cut, gpus=6)[0] == peaks("shared_memory", 2.0, *cut, gpus=6)[0]
    assert peaks("disk", 2.0, *cut, gpus=6)[2] > peaks("shared_memory", 2.0, *cut, gpus=6)[2]


def test_what_vllm_packs_tensors_in_over_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own code, with streams and a group that do nothing: what is alive at once while it packs."""
    made: list[weakref.ref[np.ndarray[Any, Any]]] = []
    peak, sizes, buffer = 0, [3, 5, 2, 7, 4, 6, 1, 8] * 12, 40

    def new(size: int) -> torch.Tensor:
        """Its memory is an array's, which lives as long as any view of it."""
        made.append(weakref.ref(array := np.zeros(size, np.uint8)))
        return torch.from_numpy(array)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for number, size in enumerate(sizes):
            yield str(number), new(size)

    def joined(pieces: list[torch.Tensor], dim: int) -> torch.Tensor:
        nonlocal peak
        whole = new(sum(piece.nbytes for piece in pieces))
        peak = max(peak, sum(array.nbytes for one in made if (array := one()) is not None))
        return whole

    monkeypatch.setattr(torch, "cat", joined)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(packed_tensor, "_get_streams", lambda device, count: [stream] * count)
    group = SimpleNamespace(broadcast=lambda tensor, src: None)
    packed_tensor.packed_nccl_broadcast_producer(tensors(), group, 0, lambda named: named[1], buffer)
    assert 3 * buffer < peak <= packed("nccl", buffer, max(sizes))


@pytest.mark.parametrize("sleeps", [True, False])
def test_engines_on_the_trainers_gpus_wake_beside_its_state(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, sleeps: bool
) -> None:
    """40 % of the first GPU is theirs: all of it while new weights come, and where they do not sleep always."""
    small = tmp_path / "run.toml"
    small.write_text(TINY_RL)
    theirs = ['--rollout.arguments=["--gpu-memory-utilization=0.4"]']
    shared = ["--rollout.sleep=true"] if sleeps else ["--rollout.transport=ipc"]
    found, apart = (planned(capsys, more, run_file=small, gpus=2) for more in ([*theirs, *shared], theirs))
    assert (found["gpus"], apart["gpus"]) == (2, 3)
    (first, *others), without = found["memory"], apart["memory"][0]["peaks"]
    assert [rank["peaks"].get("wake") for rank in others] == [None] * len(others)
    taken = 0.4 * H100.memory + H100.context
    more = H100.context if sleeps else taken
    assert first["peaks"].pop("wake") - first["peaks"].pop("sync") == pytest.approx(taken - more)
    assert first["peaks"] == pytest.approx({phase: without[phase] + more for phase in first["peaks"]})
    run(PlanConfig(run_file=small, gpus=2), [*theirs, *shared, *PIPELINE], as_json=False)
    text = capsys.readouterr().out
    assert "at wake" in text
    assert "on 2 GPUs and 0 of the fleet" in text
