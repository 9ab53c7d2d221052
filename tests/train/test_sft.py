"""Supervised fine-tuning against transformers row by row, against itself interrupted, and by what it has learned."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_r1.config.load import dump, load, validate
from megatron_r1.config.sections import OptimSection, ParallelSection, PolicySection
from megatron_r1.config.sft import SFTConfig
from megatron_r1.data.chats import Chats
from megatron_r1.data.encoded_chats import EncodedChats, encode
from megatron_r1.data.files import write_lines
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError, DataError, NumericsError
from megatron_r1.loss.cross_entropy import CrossEntropy
from megatron_r1.model import hf_folder
from megatron_r1.model.build import build_model
from megatron_r1.model.parallel import initialize
from megatron_r1.train.batch import Minibatch, Share, Trajectory, split
from megatron_r1.train.heartbeat import FOLDER, HUNG, read
from megatron_r1.train.policy import Policy
from megatron_r1.train.sft import run
from tests.data.chat_rows import VOCABULARY, row, source, write_tokenizer
from tests.end_to_end import runs
from tests.train.conftest import MODEL

ROOT = Path(__file__).parents[2]
ROWS = [row(number) for number in range(3, 11)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights and its own tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = write_tokenizer(folder)
    config = json.loads((MODEL / "config.json").read_text())
    config |= {"num_nextn_predict_layers": 0, "vocab_size": VOCABULARY}
    (folder / "config.json").write_text(json.dumps(config))
    initialize(ParallelSection(), seed=1)
    model = build_model(PolicySection(path=folder, load_weights=False, dtype="float32", init_std=0.08), 64)
    hf_folder.write(folder / "hf", model.hf, model.export(torch.float32), tokenizer)
    return folder / "hf"


def config(base: Path, output: Path, rows: list[dict[str, Any]] = ROWS, **changes: Any) -> SFTConfig:
    """A run of a few steps over `rows`."""
    write_lines(base.parent / "chats.jsonl", rows)
    tree: dict[str, Any] = {
        "output": str(output),
        "data": [str(base.parent / "chats.jsonl")],
        "model": {"path": str(base), "dtype": "float32"},
        "batch": 3,
        "max_length": 64,
        "tokens_per_microbatch": 70,
        "report": {"console": False, "tensorboard": False},
        "optim": {"lr": 1e-2, "min_lr": 1e-3, "weight_decay": 0.0},
    }
    return validate(SFTConfig, tree | changes, where="test")


def journal(output: Path, kind: str = "step") -> list[dict[str, float]]:
    """What was recorded, but for times."""
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "elapsed", "tokens_per_second", "tflops", "memory_peak")
    return [
        {name: value for name, value in entry.items() if not name.startswith(timed)}
        for entry in found
        if entry["kind"] == kind
    ]


def packed(base: Path, folder: Path) -> tuple[list[Trajectory], Minibatch]:
    """The rows by themselves, and as one minibatch of several packs."""
    encode([source(folder, *ROWS)], Tokenizer.load(base), folder / "cache", 64, strict=True)
    chats = EncodedChats(folder / "cache")
    rows = [Trajectory(chats.tokens(n), chats.response_length(n)) for n in range(len(chats))]
    minibatch = next(split(rows, 1, 0, CrossEntropy(), Share(0, 1, 70, torch.device("cpu"))))
    assert 1 < len(minibatch) < len(rows)
    return rows, minibatch


def update(base: Path, minibatch: Minibatch) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of one update, and its gradient under Hugging Face names."""
    initialize(ParallelSection(), seed=1)
    model = build_model(PolicySection(path=base, dtype="float32"), 64)
    policy = Policy(model, OptimSection(lr=1e-3, clip_grad=1e9), updates=1)
    figures = policy.step(minibatch, CrossEntropy())
    gradients: dict[str, torch.Tensor] = {name: param.main_grad for name, param in model.module.named_parameters()}
    named: dict[str, torch.Tensor] = {}
    for rule in model.map.rules:
        if rule.megatron in gradients:
            named.update(zip(rule.hf, rule.cut(gradients[rule.megatron]), strict=True))
    return figures["loss"], {name: gradient.clone() for name, gradient in named.items()}


def test_loss_and_gradient_are_those_of_single_rows_in_transformers(base: Path, tmp_path: Path) -> None:
    rows, minibatch = packed(base, tmp_path)
    loss, gradients = update(base, minibatch)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    trained = sum(trajectory.response_length for trajectory in rows)
    expected = torch.tensor(0.0)
    for trajectory in rows:
        logits = model(torch.tensor([trajectory.tokens])).logits[0]
        for position in range(len(trajectory.tokens) - trajectory.response_length, len(trajectory.tokens)):
            distribution = torch.log_softmax(logits[position - 1], -1)
            expected = expected - distribution[trajectory.tokens[position]] / trained
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    compared = 0
    for name, parameter in model.named_parameters():
        if name in gradients and parameter.grad is not None:
            difference = (gradients[name] - parameter.grad).norm()
            assert difference <= 1e-3 * parameter.grad.norm(), name
            compared += 1
    assert compared > 30  # all but the experts, which transformers stacks


def test_labels_of_a_prompt_change_nothing_and_those_of_a_response_do(base: Path, tmp_path: Path) -> None:
    _, minibatch = packed(base, tmp_path)
    loss, gradients = update(base, minibatch)
    for micro in minibatch:
        masked = torch.ones(micro.labels.numel(), dtype=torch.bool)
        masked[micro.selected] = False
        assert masked.sum() > 10
        micro.labels[:, masked] = (micro.labels[:, masked] + 1) % VOCABULARY
    other_loss, other = update(base, minibatch)
    assert other_loss == loss
    assert [name for name in gradients if not torch.equal(other[name], gradients[name])] == []
    micro.labels[:, micro.selected[-1]] = 5
    assert update(base, minibatch)[0] != loss


def test_every_response_is_trained_to_end(base: Path, tmp_path: Path) -> None:
    rows, minibatch = packed(base, tmp_path)
    eos = Tokenizer.load(base).eos_id
    ended = 0
    for micro in minibatch:
        predicted = micro.labels.flatten()[micro.selected]
        for segment in micro.inputs.segments.unique():
            ended += int(predicted[micro.inputs.segments == segment][-1] == eos)
    assert ended == len(rows)
    assert all(trajectory.tokens.count(eos) == 1 for trajectory in rows)


def test_it_learns_a_handful_of_rows_by_heart(base: Path, tmp_path: Path) -> None:
    summary = run(config(base, tmp_path, ROWS[:4], epochs=60, batch=4))
    assert summary["steps"] == 60
    assert summary["loss"] < 0.02
    assert journal(tmp_path)[0]["loss"] > 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokenizer = Tokenizer.load(tmp_path / "hf")
    for example in Chats(tokenizer, 64).read(source(tmp_path, *ROWS[:4])):
        prompt = torch.tensor([example.prompt])
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=40,
            eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id,
        )  # fmt: skip
        assert out[0, prompt.size(1) :].tolist() == example.response


def test_a_resumed_run_reaches_the_same_bits(base: Path, tmp_path: Path) -> None:
    """The guard's window too: all above its median is skipped here, and nothing before it is half full."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    settings: dict[str, Any] = {"epochs": 4, "validation": {"share": 0.3, "every": 2}}
    settings |= {"checkpoint": {"every": 2, "keep": 10}}
    settings |= {"guard": {"spike": "skip", "window": 4, "spike_sigma": 1e-3, "max_skips": 100}}
    summary = run(config(base, whole, **settings))
    assert "so the update was skipped" in (whole / "run.log").read_text()
    shutil.copytree(whole / "checkpoints/step_00000002", resumed / "checkpoints/step_00000002")
    again = run(config(base, resumed, **settings))
    ours, theirs = (load_file(folder / "hf/model.safetensors") for folder in (resumed, whole))
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    steps, kept = journal(whole), journal(resumed)
    assert kept == steps[2:]
    assert len(kept) > 1
    assert journal(resumed, "evaluation") == [entry for entry in journal(whole, "evaluation") if entry["step"] >= 2]
    moved = {"model": str(whole / "hf"), "seconds_total": summary["seconds_total"]}
    assert again | moved == summary


def test_other_data_does_not_go_on_from_a_checkpoint(base: Path, tmp_path: Path) -> None:
    run(config(base, tmp_path, epochs=1))
    with pytest.raises(ConfigError, match="is of a run with data ="):
        run(config(base, tmp_path, ROWS[::-1], epochs=1))


def test_an_update_that_is_not_finite_is_left_out_and_kept(base: Path, tmp_path: Path) -> None:
    """After an update with an absurd learning rate none is finite."""
    changes: dict[str, Any] = {"epochs": 4, "optim": {"lr": 1e30, "min_lr": 1e30}}
    changes |= {"guard": {"non_finite": "skip", "max_skips": 2}}
    with pytest.raises(NumericsError, match="max_skips = 2 updates before it were skipped"):
        run(config(base, tmp_path, **changes))
    skipped = [line for line in (tmp_path / "run.log").read_text().splitlines() if "so the update was skipped" in line]
    assert len(skipped) == 2
    bad = sorted((tmp_path / "bad_batches").iterdir())
    assert len(bad) == 3
    saved = torch.load(bad[0] / "rank_0.pt", weights_only=True)
    assert saved["update"] == "skipped"
    for micro in saved["microbatches"]:
        assert micro["loss"].shape == micro["selected"].shape


def test_a_rank_that_stops_is_named(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run_file = tmp_path / "sft.toml"
    run_file.write_text(dump(config(base, output, epochs=10_000, batch=4, guard={"deadline": 10.0})))
    with runs.Command("sft", run_file, "--parallel.processes=2") as command:
        command.until(lambda: 1 in (beats := read(output / FOLDER, 2)) and beats[1].step > 0, pause=0.5).look()
        stopped = read(output / FOLDER, 2)[1].pid
        os.kill(stopped, signal.SIGSTOP)
        assert command.end() == HUNG
        said = command.message()
    assert "megatron-r1 sft: rank 0 has waited longer than the 10 s of phase " in said
    assert re.search(rf"not answering: rank 1 .*pid {stopped}\): step [0-9]+, .*the process is stopped", said)


def test_figures_of_a_run(base: Path, tmp_path: Path) -> None:
    long, double = row(1, response=" 1" * 100), source(tmp_path, *ROWS[:2], weight=2.0)
    changes: dict[str, Any] = {"validation": {"data": [double.path]}, "epochs": 1}
    summary = run(config(base, tmp_path / "run", [*ROWS, long], **changes))
    assert (summary["rows"], summary["rows_validation"], summary["steps"]) == (8, 2, 3)
    assert summary["left_out"] == {"longer than max_length": 1}
    assert {name: part["rows"] for name, part in summary["domains"].items()} == {"math": 4, "logic": 4}
    assert summary["validation_loss"] < summary["validation_loss_base"]
    assert [entry["rows"] for entry in journal(tmp_path / "run")] == [3, 3, 2]
    recorded = (tmp_path / "run/metrics.jsonl").read_text()
    assert all(recorded.count(f'"{name}": ') == 3 for name in ("tokens_per_second", "tflops", "memory_peak_max"))
    log = (tmp_path / "run/run.log").read_text()
    assert "1 of 9 responses left out: longer than max_length" in log
    assert "1 epoch x 8 rows = 3 steps of 3 (math 4, logic 4)" in log
    weighted = run(config(base, tmp_path / "weighted", data=[{"path": double.path, "weight": 2.0}], epochs=1))
    assert (weighted["rows"], weighted["steps"]) == (2, 2)


def test_the_validation_loss_is_that_of_transformers(base: Path, tmp_path: Path) -> None:
    summary = run(config(base, tmp_path / "run", epochs=1, validation={"data": [source(tmp_path, *ROWS[:5]).path]}))
    for folder, name in ((base, "validation_loss_base"), (tmp_path / "run/hf", "validation_loss")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        total, count = 0.0, 0
        for example in Chats(Tokenizer.load(base), 64).read(source(tmp_path, *ROWS[:5])):
            tokens = torch.tensor([example.prompt + example.response])
            labels = torch.tensor([[-100] * len(example.prompt) + example.response])
            with torch.no_grad():
                total += model(tokens, labels=labels).loss.item() * len(example.response)
            count += len(example.response)
        assert summary[name] == pytest.approx(total / count, rel=1e-4)


def test_lora_trains_adapters_and_writes_a_whole_model(base: Path, tmp_path: Path) -> None:
    lora = {"rank": 4, "alpha": 8.0, "targets": ["attention", "mlp", "experts"]}
    changes: dict[str, Any] = {"model": {"path": str(base), "dtype": "float32", "lora": lora}, "epochs": 12, "batch": 8}
    run(config(base, tmp_path, **changes))
    losses = [entry["loss"] for entry in journal(tmp_path)]
    assert losses[-1] < 0.5 * losses[0]
    log = (tmp_path / "run.log").read_text()
    assert "parameters are trained" in log
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", base))
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: tensor.shape for n, tensor in theirs.items()}
    changed = {name for name in theirs if not torch.equal(ours[name], theirs[name])}
    assert changed
    assert all("_proj" in name for name in changed)


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([row(1, response="</think>")], {}, r"line 1: <think> and </think> do not match"),
        ([row(1)], {"validation": {"share": 0.5}}, r"validation.share = 0.5 of 1 rows leaves none to"),
        ([row(1)], {"max_length": 4}, r"no row is left to train on: of 1, 1 longer than max_length"),
    ],
)
def test_bad_data_is_refused(
    base: Path, tmp_path: Path, rows: list[dict[str, Any]], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        run(config(base, tmp_path, rows, **changes))
    assert not (tmp_path / "summary.json").exists()


def test_the_example_is_a_run_whose_rows_are_sound(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    example = load(Path("examples/sft/chats.toml"), [f"--output={tmp_path}", f"--model.path={base}"], SFTConfig)
    assert [entry.weight for entry in example.data] == [1.0, 2.0]
    encode(example.data, Tokenizer.load(base), tmp_path / "cache", example.max_length, strict=True)
    audit = EncodedChats(tmp_path / "cache").audit
    assert (audit.examples, audit.warnings()) == (12, [])
