"""What the tests of several losses need."""

from collections.abc import Iterator

import pytest

from tests.loss.vocab_parallel import TwoRanks


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[TwoRanks]:
    """Two processes that share a vocabulary."""
    with TwoRanks() as ranks:
        yield ranks
