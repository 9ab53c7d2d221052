"""Which components the contracts are run on: every built-in, or those named by `--component`."""

import tomllib
from typing import Any

import pytest

from megatron_r1.config import component
from megatron_r1.data.tasks.base import Task
from megatron_r1.errors import ConfigError
from megatron_r1.model.family import Family
from megatron_r1.registry import resolve
from megatron_r1.reward.base import Reward
from megatron_r1.rollout.tools.base import Tool
from tests.contracts.built_in import FAMILIES, REWARDS, TASKS, TOOLS

KINDS = {"reward": (Reward, REWARDS), "task": (Task, TASKS), "tool": (Tool, TOOLS), "family": (Family, FAMILIES)}


def section(text: str) -> dict[str, Any]:
    """`folder/file.py:Name`, or an inline TOML table with `type` and the component's own keys."""
    try:
        parsed: dict[str, Any] = tomllib.loads(f"it = {text}")["it"] if text.startswith("{") else {"type": text}
        resolve("reward", parsed["type"])
    except (ConfigError, KeyError, tomllib.TOMLDecodeError) as error:
        raise pytest.UsageError(f"--component {text}: {error}") from error
    return parsed


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for kind, (base, built_in) in KINDS.items():
        if f"{kind}_section" not in metafunc.fixturenames:
            continue
        named = [section(text) for text in metafunc.config.getoption("component")]
        chosen = [part for part in named if issubclass(resolve(kind, part["type"]), base)] if named else built_in
        ids = [part.get("model", part["type"]) for part in chosen]
        metafunc.parametrize(f"{kind}_section", chosen, ids=ids, scope="module" if kind == "family" else None)


@pytest.fixture
def reward(reward_section: dict[str, Any]) -> Reward:
    built = component.build("reward", reward_section)
    assert isinstance(built, Reward)
    return built


@pytest.fixture
def task(task_section: dict[str, Any]) -> Task:
    built = component.build("task", task_section)
    assert isinstance(built, Task)
    return built


@pytest.fixture
def tool(tool_section: dict[str, Any]) -> Tool:
    built = component.build("tool", tool_section)
    assert isinstance(built, Tool)
    return built


def refuses_unknown_keys(kind: str, part: dict[str, Any]) -> bool:
    with pytest.raises(ConfigError, match="unknown key 'no_such_key'"):
        component.build(kind, {**part, "no_such_key": 1})
    return True
