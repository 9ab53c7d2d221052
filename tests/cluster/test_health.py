"""What makes a node bad, and who meets whom."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_r1.cluster.health import MissingError, meet, pairs
from megatron_r1.cluster.lives import free_ports
from megatron_r1.cluster.node_checks import Findings, disk, graphics, look

WELL = "0, 4, 0, No, No, Not Active, Not Active\n1, 4, 0, No, No, Not Active, Not Active\n"


def test_gpus_that_are_well() -> None:
    assert graphics(WELL, 2) == []
    assert graphics("0, 4, [N/A], [N/A], [N/A], Not Active, Not Active", 1) == []  # a GPU without ECC


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (WELL.split("\n", 1)[0], "1 GPUs, not 2"),
        (WELL.replace("1, 4,", "1, 60000,"), "GPU 1: 60000 MiB are in use"),
        (WELL.replace("0, 4, 0", "0, 4, 3"), "GPU 0: uncorrected ECC errors (3)"),
        (WELL.replace("No, No", "Yes, No", 1), "GPU 0: rows of memory wait to be remapped: it has to be reset (Yes)"),
        (WELL[::-1].replace("evitcA toN", "evitcA", 1)[::-1], "GPU 1: slowed down because it is too hot (Active)"),
    ],
)
def test_gpus_that_are_not(said: str, expected: str) -> None:
    assert graphics(said, 2) == [expected]


def test_disks(tmp_path: Path) -> None:
    assert disk(tmp_path, 0) == []
    assert "less than 1e+09" in disk(tmp_path, 1e9)[0]
    assert "cannot be written to" in disk(tmp_path / "missing", 0)[0]


def test_a_site_has_a_check_of_its_own(tmp_path: Path) -> None:
    assert look(0, tmp_path, "true").bad == look(0, tmp_path, "").bad
    assert "the fan is loud" in look(0, tmp_path, "echo the fan is loud; false").bad[-1]


def test_missing_gpus_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert any("nvidia-smi" in line for line in look(8, tmp_path, "").bad)


def test_ranks_of_a_node_write_one_file(tmp_path: Path) -> None:
    Findings(notes=["fast"]).write(tmp_path / "n1")
    assert (tmp_path / "n1").read_text() == "well\nnote: fast\n"
    Findings(bad=["slow"]).write(tmp_path / "n1")
    assert (tmp_path / "n1").read_text() == "bad\nnote: fast\nbad: slow\n"


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 7, 8])
def test_each_node_meets_two_others(nodes: int) -> None:
    met = {node: pairs(node, nodes) for node in range(nodes)}
    for node, own in met.items():
        assert len(own) == len({tuple(pair) for pair in own})
        for number, pair in enumerate(own):
            assert node in pair
            (other,) = set(pair) - {node}
            assert pair in met[other], "both know of it"
            assert number == met[other].index(pair) or min(len(own), len(met[other])) == 1, "in the same round"
    if nodes > 2 and nodes % 2 == 0:
        assert all(len(own) == 2 for own in met.values())


def test_two_nodes_meet(tmp_path: Path) -> None:
    """Their all-reduces are over."""
    store = f"--store=127.0.0.1:{free_ports('127.0.0.1', 1)[0]}"
    command = [sys.executable, "-m", "megatron_r1.cluster.health", f"--folder={tmp_path}", store]
    ranks = [
        subprocess.Popen(
            [*command, "--gpus=0", f"--path={tmp_path}", "--nodes=n0,n1"],
            env={"SLURM_NODEID": str(node), "SLURM_LOCALID": "0", "PATH": "/usr/bin:/bin",
                 "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        for node in range(2)
    ]  # fmt: skip
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    for node in range(2):
        lines = (tmp_path / f"n{node}").read_text().splitlines()
        assert not [line for line in lines if "all-reduce" in line or "clock" in line], lines
        assert [line for line in lines if line.startswith("note: pair/0-1: ")]


def test_nodes_that_do_not_come_are_named() -> None:
    """One has not begun, of another one of two ranks has not; those that are there do not wait for ever."""
    address, nodes = f"127.0.0.1:{free_ports('127.0.0.1', 1)[0]}", ["n1", "n2", "n3"]
    met = [meet(address, node, nodes, local, 2) for node, local in ((0, 0), (0, 1), (1, 0))]
    first, second, third = (one for one in met if one)
    for one in (first, second):
        one.store.add(f"here/{one.node}", 1)
        one.store.add("here", 1)
    with pytest.raises(MissingError, match=r"not here after 0\.2 s, so nothing was compared: n2, n3$"):
        third.gather(0.2)


def test_the_first_node_can_be_gone() -> None:
    assert meet(f"127.0.0.1:{free_ports('127.0.0.1', 1)[0]}", 1, ["n1", "n2"], 0, 1, seconds=1) is None
