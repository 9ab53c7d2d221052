"""Components by name."""

import sys
from pathlib import Path

import pytest

from megatron_r1.config.component import build
from megatron_r1.errors import ConfigError
from megatron_r1.registry import BUILT_IN, resolve

OWN_REWARD = """
from megatron_r1.config.section import Section


class Brevity:
    class Config(Section):
        limit: int = 10

    def __init__(self, config):
        self.config = config
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_lab_rewards.py").write_text(OWN_REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_lab_rewards", raising=False)
    return "my_lab_rewards"


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in BUILT_IN.items() for name in names])
def test_every_built_in_resolves(kind: str, name: str) -> None:
    assert resolve(kind, name).__name__ == BUILT_IN[kind][name].split(":")[1]


def test_own_component(own_module: str) -> None:
    section = {"type": f"{own_module}:Brevity", "limit": 3}
    assert build("reward", section).config.limit == 3
    assert section == {"type": f"{own_module}:Brevity", "limit": 3}


def test_own_component_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "anywhere" / "rewards.py"
    file.parent.mkdir()
    file.write_text(OWN_REWARD)
    first = resolve("reward", f"{file}:Brevity")
    assert build("reward", {"type": f"{file}:Brevity", "limit": 3}).config.limit == 3
    assert resolve("reward", f"{file}:Brevity") is first
    with pytest.raises(ConfigError, match=r"cannot be imported: .*No such file"):
        resolve("reward", f"{tmp_path}/nowhere.py:Brevity")
    with pytest.raises(ConfigError, match=r"cannot be imported: .*Levity"):
        resolve("reward", f"{file}:Levity")
    file.with_name("raising.py").write_text("import os\nno_such_name\n")
    with pytest.raises(ConfigError, match=r"NameError.*raising\.py.*line 2"):
        resolve("reward", f"{tmp_path}/anywhere/raising.py:Brevity")
    file.with_name("broken.py").write_text("def f(:")
    for _ in range(2):
        with pytest.raises(ConfigError, match="cannot be imported: invalid syntax"):
            resolve("reward", f"{tmp_path}/anywhere/broken.py:Brevity")


def test_unknown_option_names_the_nearest(own_module: str) -> None:
    with pytest.raises(
        ConfigError, match=r"reward 'my_lab_rewards:Brevity': unknown key 'limits', did you mean 'limit'"
    ):
        build("reward", {"type": f"{own_module}:Brevity", "limits": 3})


def test_unknown_name_names_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"no reward is called 'acuracy', did you mean 'accuracy'\?.*cosine, equations, format"
    ):
        resolve("reward", "acuracy")


@pytest.mark.parametrize("name", ["no.such.module:Name", "json:NoSuchName"])
def test_what_cannot_be_imported(name: str) -> None:
    with pytest.raises(ConfigError, match=f"reward '{name}' cannot be imported"):
        resolve("reward", name)


@pytest.mark.parametrize("name", [":Name", "json:", ":"])
def test_half_a_name(name: str) -> None:
    with pytest.raises(ConfigError):
        resolve("reward", name)


@pytest.mark.parametrize("section", [{}, {"limit": 3}, {"type": 3}])
def test_section_without_a_type(section: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="needs a `type`"):
        build("reward", section)
