"""Reinforcement learning with a learner of four processes: the engine gets the bytes that one process sends.

The same run file is run by one process and by TP2 x PP2, of which every rank writes a file of weights, and EP2 x DP2,
whose first rank writes all, each with a vLLM engine of its own. What an engine has received stands in its log, a
checksum of all bytes of all tensors for each version of the weights; what it made of them is kept by a reward that
looks at every sample.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_r1.config.section import Section
from megatron_r1.reward.base import Reward
from megatron_r1.rollout.checksum import WHOLE
from megatron_r1.types import Group
from tests.distributed.layouts import relative
from tests.end_to_end import runs
from tests.end_to_end.runs import Command, rows

LAYOUTS = {
    "one": [],
    "tp2_pp2": ["--parallel.tensor=2", "--parallel.pipeline=2", "--parallel.pipeline_layout=Et|ttmL",
                "--rollout.transport=disk"],
    "ep2_dp2": ["--parallel.processes=4", "--parallel.expert=2"],
}  # fmt: skip
SEVERAL = ["tp2_pp2", "ep2_dp2"]
WRITTEN = {"tp2_pp2": [f"rank-{rank:05d}.safetensors" for rank in range(4)], "ep2_dp2": []}
"""Files that stand on disk when the run has ended."""
STEPS = 2
BOUND = 1e-5
"""Largest relative difference from one process once sums are taken in another order (tests/distributed/layouts.py)."""
RECEIVED = re.compile(r"received weights (\d+): (\d+) tensors, checksum (\w+)")

pytestmark = pytest.mark.timeout(2000)  # several starts of vLLM in one test


class Witness(Reward):
    """Writes down what the engine sampled."""

    class Config(Section):
        file: Path

    def __call__(self, group: Group) -> list[float | None]:
        samples = [[sample.weight_version, sample.tokens, sample.logprobs] for sample in group.samples]
        with self.config.file.open("a") as file:
            file.write(json.dumps([group.prompt_tokens, samples]) + "\n")
        return [None for _ in group.samples]


@dataclass
class Run:
    """What is left of a run."""

    output: Path

    @property
    def received(self) -> dict[int, tuple[int, str]]:
        """Version -> number of tensors and checksum, in the engine's words."""
        said = RECEIVED.findall((self.output / "logs/engine-0.log").read_text())
        return {int(version): (int(tensors), checksum) for version, tensors, checksum in said}

    def samples(self, version: int) -> list[Any]:
        """Prompt, and tokens and log-probabilities of its responses, of all groups that these weights gave."""
        groups = [json.loads(line) for line in self.output.with_suffix(".jsonl").read_text().splitlines()]
        return sorted(group for group in groups if {sample[0] for sample in group[1]} == {version})

    def tokens(self, version: int) -> list[Any]:
        """As `samples`, without the log-probabilities."""
        return [(prompt, [tokens for _, tokens, _ in samples]) for prompt, samples in self.samples(version)]

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.output / "hf/model.safetensors")


def run_file(prepared: Path, output: Path) -> Path:
    """Two steps of two updates; the MTP layer is trained, and the selection bias moves."""
    tree = runs.rl(prepared, output, runs.free_port()) | {"steps": STEPS, "logprob_bound": 1e-5}
    tree["model"] |= {"mtp_loss_coef": 0.3}
    tree["rewards"]["witness"] = {"type": f"{__name__}:Witness", "file": str(output.with_suffix(".jsonl"))}
    tree["loss"] = {"type": "grpo", "kl_coef": 0.05}
    tree["reference"]["refresh_every"] = 1
    tree["rollout"] |= {"max_tokens": 24}
    # As in tests/distributed/kinds.py: with an eps of 1e-8 the first steps are the sign of rounding.
    tree["optim"] = {"lr": 2e-3, "eps": 1e-4}
    return runs.write(output.with_suffix(".toml"), tree)


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Runs a layout, once, to its end."""
    folder, done = tmp_path_factory.mktemp("layouts"), dict[str, Run]()

    def find(layout: str) -> Run:
        if layout not in done:
            output = folder / layout
            with Command("rl", run_file(prepared, output), *LAYOUTS[layout]) as command:
                assert command.end(900) == 0, command.message()
            done[layout] = Run(output)
        return done[layout]

    return find


@pytest.mark.parametrize("layout", SEVERAL)
def test_the_engine_receives_the_same_bytes(run: Callable[[str], Run], layout: str) -> None:
    """Of the weights that all start from; those after an update differ from one process's by rounding."""
    alone, found = run("one").received, run(layout).received
    assert found.keys() == alone.keys() == {0, 1, 2}
    assert found[0] == alone[0]
    assert len(set(found.values())) == 3
    files = [file.name for file in (run(layout).output / "sync").glob("weights-2/*.safetensors")]
    assert sorted(files) == WRITTEN[layout]
    weights = run("one").weights().values()
    assert found[0][0] == len(weights)
    assert max(tensor.nbytes for tensor in weights) <= WHOLE, "the checksum is one of every byte"


@pytest.mark.parametrize("layout", SEVERAL)
def test_the_engine_answers_with_the_same_bits(run: Callable[[str], Run], layout: str) -> None:
    """The held-out questions and the first rollout: token ids, and what the engine says of them."""
    alone = run("one").samples(version=0)
    assert sorted(len(samples) for _, samples in alone) == [1] * 4 + [4] * 4
    assert run(layout).samples(version=0) == alone


@pytest.mark.parametrize("layout", SEVERAL)
def test_the_learner_computes_the_same(run: Callable[[str], Run], prepared: Path, layout: str) -> None:
    """Figures of both steps and the exported weights; after an update the samples are still the same token ids."""
    alone, found = run("one"), run(layout)
    assert found.tokens(version=1) == alone.tokens(version=1)
    for ours, theirs in zip(rows(found.output), rows(alone.output), strict=True):
        assert ours.keys() == theirs.keys()
        figures = {name: value for name, value in theirs.items() if isinstance(value, int | float)}
        sizes = {name: abs(value) if name == "grad_norm" else max(abs(value), 1.0) for name, value in figures.items()}
        apart = {name: abs(ours[name] - value) / sizes[name] for name, value in figures.items()}
        assert {name: value for name, value in apart.items() if value > BOUND} == {}
    assert difference(found, alone) < BOUND
    assert difference(alone, Run(prepared / "base")) > 200 * BOUND


def test_one_process_goes_on_from_a_layout(run: Callable[[str], Run], prepared: Path, tmp_path: Path) -> None:
    """It sends the bytes that the layout sent after the step that was saved."""
    saved, output = run("tp2_pp2"), tmp_path / "one"
    shutil.copytree(saved.output / "checkpoints/step_00000001", output / "checkpoints/step_00000001")
    with Command("rl", run_file(prepared, output)) as command:
        assert command.end(900) == 0, command.message()
    resumed = Run(output)
    assert resumed.received.keys() == {1, 2}
    assert resumed.received[1] == saved.received[1]
    assert resumed.samples(version=1) == saved.samples(version=1)
    assert difference(resumed, saved) < BOUND


def difference(ours: Run, theirs: Run) -> float:
    """Of the exported weights, the largest of any tensor."""
    mine, others = ours.weights(), theirs.weights()
    assert mine.keys() == others.keys()
    return max(relative(mine[name], others[name]) for name in others)
