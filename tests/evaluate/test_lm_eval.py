"""lm-evaluation-harness: what it is asked, what is read of its answer; and itself."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_r1.cli import main
from megatron_r1.config.lm_eval import LmEvalConfig
from megatron_r1.config.load import dump, load, validate
from megatron_r1.errors import ConfigError, DataError, EngineError
from megatron_r1.evaluate import harness, lm_eval
from megatron_r1.evaluate.harness import HarnessError, arguments, check_installed, check_tasks, measure
from megatron_r1.evaluate.lm_eval import figures
from tests.evaluate.scripted_harness import RESULTS
from tests.rollout.tiny_model import free_port

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/evaluate/lm_eval.toml"
URL = "http://127.0.0.1:1"


def config(model: Path, output: Path, **changes: Any) -> LmEvalConfig:
    rollout = {"port": free_port(), "max_model_len": 192, "max_tokens": 24, "kv_cache_gib": 0.1, "threads": 1}
    tree = {"output": str(output), "model": {"path": str(model), "dtype": "float32"}, "rollout": rollout}
    return validate(LmEvalConfig, tree | {"tasks": ["gsm8k", "mmlu"]} | changes, "run.toml")


def options(config: LmEvalConfig) -> dict[str, str]:
    action, *found = arguments(config, URL)
    assert action == "run"
    return dict(option.removeprefix("--").partition("=")[::2] for option in found)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "HARNESS", "tests.evaluate.scripted_harness")
    monkeypatch.chdir(ROOT)


def test_the_command_line(tmp_path: Path, model: Path) -> None:
    asked = options(config(model, tmp_path / "out"))
    served = json.loads(asked.pop("model_args"))
    responses = asked.pop("use_cache")
    assert asked == {
        "model": "local-completions",
        "tasks": "gsm8k,mmlu",
        "output_path": f"{tmp_path}/out/lm_eval",
        "log_samples": "",
        "seed": "0",
    }
    assert served["base_url"] == f"{URL}/v1/completions"
    assert (served["model"], served["tokenizer"]) == (model.name, str(model))
    assert (served["max_length"], served["max_gen_toks"], served["add_bos_token"]) == (192, 24, True)
    assert Path(responses).parent == tmp_path / "out/lm_eval"


def test_options_reach_the_command_line(tmp_path: Path, model: Path) -> None:
    generation = {"temperature": 1e-5, "until": ["\n\n", "a,b='c'"]}
    changes = {"num_fewshot": 0, "limit": 7, "apply_chat_template": True, "system_instruction": "Be brief, “all” = 1."}
    asked = options(config(model, tmp_path, generation=generation, include_path="tasks", seed=5, **changes))
    assert json.loads(asked["gen_kwargs"]) == generation
    assert (asked["num_fewshot"], asked["limit"], asked["include_path"], asked["seed"]) == ("0", "7", "tasks", "5")
    assert asked["system_instruction"] == "Be brief, “all” = 1."
    assert "apply_chat_template" in asked
    served = json.loads(asked["model_args"])
    assert (served["seed"], served["add_bos_token"]) == (5, False)
    forced = options(config(model, tmp_path, apply_chat_template=True, add_bos_token=True))
    assert json.loads(forced["model_args"])["add_bos_token"] is True


def test_responses_are_kept_for_the_model_and_settings_that_gave_them(tmp_path: Path, model: Path) -> None:
    first = options(config(model, tmp_path))["use_cache"]
    assert options(config(model, tmp_path, concurrency=2, tasks=["other"], limit=3))["use_cache"] == first
    assert options(config(model, tmp_path, seed=1))["use_cache"] != first
    copy = tmp_path / model.name
    copy.mkdir()
    for file in model.iterdir():
        (copy / file.name).symlink_to(file)
    assert options(config(copy, tmp_path))["use_cache"] != first


def test_figures() -> None:
    assert figures(RESULTS) == {
        "tasks": {
            "gsm8k": {
                "version": 3.0,
                "fewshot": 5,
                "questions": 8,
                "exact_match,strict-match": 0.25,
                "exact_match_error,strict-match": 0.125,
                "exact_match,flexible-extract": 0.5,
                "exact_match_error,flexible-extract": None,
            },
            "mmlu_law": {
                "version": 1.0,
                "fewshot": 0,
                "questions": 8,
                "acc": 0.75,
                "acc_error": pytest.approx(float("nan"), nan_ok=True),
            },
        },
        "groups": {"mmlu": {"version": 2, "fewshot": None, "questions": None, "acc": 0.75, "acc_error": 0.0625}},
    }


def test_the_verb(
    tmp_path: Path, model: Path, scripted: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """All but the server, which this harness does not ask."""

    class Unasked:
        server = type("Alive", (), {"url": URL, "alive": lambda self: True})()

    @contextmanager
    def no_server(*_: object) -> Iterator[type[Unasked]]:
        yield Unasked

    monkeypatch.setattr(lm_eval, "text_server", no_server)
    file = tmp_path / "run.toml"
    file.write_text(dump(config(model, tmp_path / "out")))
    assert main(["lm-eval", str(file), "--json"]) == 0
    said = capfd.readouterr()
    results = json.loads(said.out)
    assert results == json.loads((tmp_path / "out/results.json").read_text(), parse_constant=pytest.fail)
    assert results["harness"] == "lm_eval 0.4.13"
    assert results["tasks"]["gsm8k"]["exact_match,strict-match"] == 0.25
    assert results["tasks"]["mmlu_law"]["acc_error"] is None
    assert results["groups"]["mmlu"]["acc"] == 0.75
    assert "asking for ['gsm8k', 'mmlu']" in said.err
    assert "0.1250" in said.err


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "HARNESS", "a_package_that_is_not_there")
    with pytest.raises(ConfigError, match=r"requirements/install.sh .venv requirements/lm_eval\.lock"):
        check_installed()


@pytest.mark.parametrize(
    ("task", "kind", "message"),
    [
        ("absent", ConfigError, "the harness has no absent; .* lists what it has, and `include_path`"),
        ("broken", HarnessError, "validate .* ended with code 1"),
        ("fails", HarnessError, "ended with code 3"),
        ("silent", HarnessError, "ended without results below"),
        ("garbled", DataError, r"results_\d+\.json does not hold results of the harness"),
    ],
)
def test_errors(tmp_path: Path, model: Path, scripted: None, task: str, kind: type[Exception], message: str) -> None:
    asked = config(model, tmp_path, tasks=["gsm8k", task])
    earlier = tmp_path / "lm_eval" / model.name / "results_1.json"
    earlier.parent.mkdir(parents=True)
    earlier.write_text(json.dumps(RESULTS))
    with pytest.raises(kind, match=message):
        check_and_measure(asked)


def check_and_measure(config: LmEvalConfig) -> None:
    check_tasks(config)
    measure(config, URL, lambda: None)


def test_a_dead_server_ends_the_harness(tmp_path: Path, model: Path, scripted: None) -> None:
    started = tmp_path / "lm_eval" / model.name / "started"

    def watch() -> None:
        if started.exists():
            raise EngineError("the server has died")

    with pytest.raises(EngineError, match="the server has died"):  # not after the 600 s that it would sleep
        measure(config(model, tmp_path, tasks=["hangs"]), URL, watch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": []}, "tasks"),
        ({"rollout": {"max_model_len": 64, "max_tokens": 64}}, "max_tokens 64 leaves no room"),
        ({"rollout": {"max_model_len": 64, "temperature": 1.0}}, "unknown key 'rollout.temperature'"),
        ({"limit": 0}, "limit"),
    ],
)
def test_bad_configs(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, tmp_path, **changes)


def test_the_example(tmp_path: Path) -> None:
    resolved = tmp_path / "resolved.toml"
    resolved.write_text(dump(load(EXAMPLE, [], LmEvalConfig)))
    assert load(resolved, [], LmEvalConfig) == load(EXAMPLE, [], LmEvalConfig)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness, from `.venv/lm_eval` where the environment does not have it: `make test` puts it there."""
    if find_spec("lm_eval") is None:
        folder = Path(sys.prefix) / "lm_eval"
        assert (folder / "lm_eval").is_dir(), "no harness to test: make .venv/lm_eval"
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)


def test_the_harness_itself(
    tmp_path: Path, model: Path, installed: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The example's tasks through a real server: log-likelihoods as transformers has them, and what a second run asks.

    One task generates, the other compares log-likelihoods. Nothing comes from a hub.
    """
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tasks = {"tasks": ["chain_sums", "chain_sums_choice"], "include_path": str(EXAMPLE.with_name("lm_eval_tasks"))}
    asked = config(model, tmp_path, num_fewshot=0, **tasks)
    found = lm_eval.run(asked)["tasks"]
    assert [entry["questions"] for entry in found.values()] == [24, 24]
    assert 0 <= found["chain_sums_choice"]["acc"] <= 1
    assert found["chain_sums_choice"]["acc_error"] > 0
    assert found["chain_sums"]["exact_match,answer"] == 0.0, "random weights do not add"
    rows = samples(tmp_path, "chain_sums_choice")
    differences = [abs(theirs - ours) for row in rows[:6] for theirs, ours in zip(*both(model, row), strict=True)]
    assert len(differences) == 24
    assert max(differences) < 1e-3
    capfd.readouterr()
    again = figures(measure(asked, URL, lambda: None))["tasks"]  # nothing listens there
    assert again == found
    assert "Requests remaining: 0" in capfd.readouterr().err


def samples(output: Path, task: str) -> list[dict[str, Any]]:
    """The harness's own record of a task, a row for each question."""
    (file,) = output.glob(f"lm_eval/*/samples_{task}_2*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def both(model: Path, row: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Log-likelihoods of a question's choices: the harness's, and those of transformers."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    ours = []
    for pair in row["arguments"].values():
        context, text = pair["arg_0"], pair["arg_1"]
        prompt, response = (tokenizer(part, add_special_tokens=False).input_ids for part in (context, text))
        ids = torch.tensor([[1, *prompt, *response]])
        with torch.no_grad():
            logprobs = network(ids).logits[0, :-1].log_softmax(-1)
        ours.append(logprobs.gather(1, ids[0, 1:, None])[len(prompt) :].sum().item())
    return [float(answer[0][0]) for answer in row["resps"]], ours
