import json
import statistics
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from megatron_r1.cli import main
from megatron_r1.config.evaluation import EvaluateConfig, FilterConfig, NucleusSection, SamplingSection
from megatron_r1.config.load import validate
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError
from megatron_r1.evaluate import filter as filtering
from megatron_r1.evaluate.benchmark import figures, run
from megatron_r1.evaluate.estimators import interval
from megatron_r1.rollout.answers import Answer
from megatron_r1.rollout.fleet import Fleet
from megatron_r1.types import Question
from tests.evaluate.run_files import KNOWN, lines, over, sampling
from tests.evaluate.scripted import Opener
from tests.rollout.tiny_model import free_port

GENERATED = {"type": "reasoning_gym", "dataset": "chain_sum", "options": {"min_terms": 2, "max_terms": 2}}


def answers(*verdicts: bool | None, final: str | None = "4") -> list[Answer]:
    return [
        Answer("", 10, verdict is not False, verdict, {"known": None if verdict is None else float(verdict)}, final)
        for verdict in verdicts
    ]


def question(answer: str = "4", **metadata: Any) -> Question:
    return Question("q", "math", "2 + 2 =", answer, metadata)


def tree(model: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return sampling(model) | {"output": str(output)} | changes


def evaluated(model: Path, output: Path, opener: Any = None, **changes: Any) -> dict[str, Any]:
    config = validate(EvaluateConfig, tree(model, output, **changes), where="the test")
    return run(config, opener or Opener())


def test_figures_by_hand() -> None:
    answered = [
        (question(), answers(True, True, False, False)),
        (question(), answers(True, True, True, False)),
        (question(), answers(False, False, False, False)),
        (question("?"), answers(None, None, None, None)),
    ]
    result = figures(answered, pass_at=[2, 1])
    rates = [0.5, 0.75, 0.0]
    assert result == {
        "questions": 4,
        "questions_not_judged": 1,
        "answers_not_judged": 0,
        "samples": 4,
        "pass@1": pytest.approx(statistics.fmean(rates)),
        "pass@1_error": pytest.approx(statistics.stdev(rates) / 3**0.5),
        "pass@1_interval": interval(rates),
        "pass@2": pytest.approx((5 / 6 + 1 + 0) / 3),
        "pass@2_interval": interval([5 / 6, 1, 0]),
        "cons@4": pytest.approx((0.5 + 0.75 + 0) / 3),
        "cons@4_interval": interval([0.5, 0.75, 0]),
        "mean_tokens": 10,
        "truncated_share": pytest.approx(7 / 16),
        "rewards": {"known": pytest.approx(5 / 12)},
    }


def test_answers_that_a_judge_failed_at_are_counted() -> None:
    result = figures([(question(), answers(True, None, False, None)), (question(), answers(None, None, None, None))])
    assert (result["questions_not_judged"], result["answers_not_judged"], result["pass@1"]) == (1, 2, 0.5)


def test_answers_that_a_judge_failed_at_vote() -> None:
    """By hand: 4 wins by three votes, its only verdict is right; 6 was never judged, so its question is left out."""

    def voted(*votes: tuple[str, bool | None]) -> list[Answer]:
        return [Answer("", 1, True, correct, {}, final) for final, correct in votes]

    right = voted(("4", None), ("5", False), ("4", True), ("4", None))
    unknown = voted(("6", None), ("6", None), ("5", False), ("6", None))
    result = figures([(question(), right), (question(), unknown)])
    assert result["cons@4"] == 1.0
    assert result["answers_not_judged"] == 5
    assert "cons@4" not in figures([(question(), unknown)])


def test_no_vote_over_programs_and_no_figures_of_nothing() -> None:
    assert "cons@2" not in figures([(question(tests={}), answers(True, False))])
    assert "cons@2" not in figures([(question(""), answers(True, False))])
    nothing = figures([(question(), answers(None, None))])
    assert (nothing["pass@1"], nothing["pass@1_error"]) == (None, None)


def test_a_model_on_several_tasks(tmp_path: Path, sums: Path, model: Path) -> None:
    tasks = {
        "sums": over(sums) | {"rewards": KNOWN},
        "few": over(sums) | {"rewards": KNOWN, "questions": 3, "samples": 4},
        "generated": {"task": GENERATED, "template": "r1_zero_short", "rewards": KNOWN, "questions": 5},
    }
    opener = Opener()
    results = evaluated(model, tmp_path / "out", opener, tasks=tasks, pass_at=[4])
    assert results == json.loads((tmp_path / "out/results.json").read_text())
    assert opener.engines[0].sampling[0] == (0.6, 0.95)
    assert (len(opener.engines), opener.asked) == (1, [4, 4, 4, 3, 4, 1])
    rows = lines(tmp_path / "out/samples.jsonl")
    assert [row["task"] for row in rows] == ["sums"] * 12 + ["few"] * 3 + ["generated"] * 5
    assert {row["prompt"] for row in rows[12:15]} <= {row["prompt"] for row in rows[:12]}
    assert len({row["question_id"] for row in rows[:12]}) == 12
    rates = [row["pass_rate"] for row in rows[:12] if row["answer"] != "?"]
    assert results["tasks"]["sums"]["pass@1"] == pytest.approx(statistics.fmean(rates))
    assert [len(row["responses"]) for row in rows[10:14]] == [16, 16, 4, 4]
    assert results["tasks"]["sums"]["questions_not_judged"] == 1
    assert results["tasks"]["sums"]["pass@1"] < results["tasks"]["sums"]["pass@4"] < 1


def test_a_second_run_counts_again_without_an_engine(
    tmp_path: Path, sums: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = {"sums": over(sums) | {"rewards": KNOWN}}
    first = evaluated(model, tmp_path / "out", tasks=tasks)
    file = tmp_path / "run.toml"
    file.write_text(tomli_w.dumps(tree(model, tmp_path / "out", tasks=tasks, pass_at=[8])))
    assert main(["evaluate", str(file), "--json"]) == 0
    said = capsys.readouterr()
    again = json.loads(said.out)
    assert "pass@8" in said.err
    assert again["tasks"]["sums"].pop("pass@8_interval")
    assert again["tasks"]["sums"].pop("pass@8") > again["tasks"]["sums"]["pass@1"]
    assert again == first


def test_other_arguments_of_the_engine_sample_again(tmp_path: Path, sums: Path, model: Path) -> None:
    """They may quantise the model; what was sampled without them is not taken for theirs."""
    tasks = {"sums": over(sums) | {"rewards": KNOWN}}
    evaluated(model, tmp_path / "out", tasks=tasks)
    opener = Opener()
    rollout = sampling(model)["rollout"] | {"arguments": ["--quantization=fp8"]}
    evaluated(model, tmp_path / "out", opener, tasks=tasks, rollout=rollout)
    assert opener.asked == [4, 4, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {}}, "tasks"),
        ({"tasks": {"a": {"task": GENERATED}}}, r"tasks\.a: 'chain_sum' makes problems without end"),
        ({"tasks": {"a": {"questions": 99}}}, r"99 questions are asked for, but 'math' has 12"),
        ({"tasks": {"a": {"rewards": {"format": {"type": "format"}}}}}, "no reward judges"),
        ({"tasks": {"a": {"samples": 2}}, "pass_at": [4]}, "task 'a' has 2 samples"),
    ],
)
def test_bad_configs_start_no_engine(
    tmp_path: Path, sums: Path, model: Path, changes: dict[str, Any], message: str
) -> None:
    changes = {**changes, "tasks": {name: over(sums) | task for name, task in changes["tasks"].items()}}
    opener = Opener()
    with pytest.raises(ConfigError, match=message):
        evaluated(model, tmp_path / "out", opener, **changes)
    assert not opener.engines


class Opened:
    """Hands one running fleet to every run that opens an engine, and counts them."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.times = 0

    def __call__(self, config: SamplingSection, output: Path, tokenizer: Tokenizer) -> AbstractContextManager[Fleet]:
        self.times += 1
        return nullcontext(self.fleet)


@pytest.fixture(scope="module")
def vllm(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    tree = sampling(model)["rollout"] | {"port": free_port()}
    section = validate(NucleusSection, tree, where="the test")
    decode = Tokenizer.load(model).decode
    with Fleet(section, model, tmp_path_factory.mktemp("run"), "float32", decode) as fleet:
        yield Opened(fleet)


def test_vllm_answers(tmp_path: Path, sums: Path, model: Path, vllm: Opened) -> None:
    """Both verbs on a real engine: a model with random weights, judged by the parity of what it says."""
    rewards = {"even": {"type": "tests.evaluate.scripted:Even"}}
    tasks = {"sums": over(sums) | {"rewards": rewards, "samples": 8}}
    result = evaluated(model, tmp_path / "a", vllm, tasks=tasks)["tasks"]["sums"]
    assert 0 < result["pass@1"] < 1
    assert 1 <= result["mean_tokens"] <= 40
    assert evaluated(model, tmp_path / "b", vllm, tasks=tasks)["tasks"]["sums"] == result
    greedy = sampling(model)["rollout"] | {"temperature": 0.0}
    evaluated(model, tmp_path / "c", vllm, tasks=tasks, rollout=greedy)
    spoken = [{answer["text"] for answer in row["responses"]} for row in lines(tmp_path / "c/samples.jsonl")]
    assert [len(texts) for texts in spoken] == [1] * 12

    config = {"output": str(tmp_path / "f"), "data": over(sums), "rewards": rewards, "pass_rate": sampling(model)}
    filtered = filtering.run(validate(FilterConfig, config, where="the test"), vllm)
    assert filtered["kept"] > 0
    assert all(0 < row["pass_rate"] < 1 for row in lines(tmp_path / "f/kept.jsonl"))
    assert vllm.times == 4
