"""What the runs of this folder start from is what those of tests/end_to_end do."""

from tests.end_to_end.conftest import prepared

__all__ = ["prepared"]
