"""One warm program for all tests of this folder, what one process sees, and a table of what was measured."""

from collections.abc import Iterator

import pytest

from tests.distributed.layouts import PARTS, Launcher, Seen, parts, table

MEASURED: pytest.StashKey[dict[str, dict[str, float]]] = pytest.StashKey()


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Runs jobs under layouts."""
    with Launcher(tmp_path_factory.mktemp("layouts")) as running:
        yield running


@pytest.fixture(scope="session")
def alone(launcher: Launcher) -> dict[str, Seen]:
    """What one process sees of every part that all layouts run."""
    return launcher.run("alone", {}, parts(*PARTS))


@pytest.fixture(scope="session")
def measured(pytestconfig: pytest.Config) -> dict[str, dict[str, float]]:
    """Layout -> largest relative differences, for the table."""
    return pytestconfig.stash.setdefault(MEASURED, {})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if (rows := config.stash.get(MEASURED, {})) and config.option.verbose > 0:
        terminalreporter.section("largest relative differences from one process")
        terminalreporter.write_line(table(rows))
