import pytest

from megatron_r1.reward.code_outputs import same_first_lines, same_output


@pytest.mark.parametrize(
    ("printed", "expected", "same", "first"),
    [
        ("3\n", "3", True, True),
        ("3  \r\n4\n\n", "3\n4", True, True),
        ("", "", True, True),
        ("", "\n", True, True),
        ("3", "3\n4", False, True),  # only the first line
        ("3\n4\n5", "3\n4", False, True),  # more lines
        ("", "3", False, False),
        ("\n3", "3", False, True),
        ("3 4", "3  4", False, False),
        ("4", "3", False, False),
        ("３", "3", False, False),
        ("3.0", "3", False, False),
    ],
)
def test_lines(printed: str, expected: str, same: bool, first: bool) -> None:
    assert same_output(printed, expected) is same
    assert same_first_lines(printed, expected) is first


def test_open_r1_passes_nothing_for_a_blank_first_line() -> None:
    """It strips the texts first, so the blank line has to be one that strip() leaves."""
    assert same_first_lines("", "")
    assert not same_output("", "a\n\nb")


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("0.3333", "0.33333333", True),
        ("0.33", "0.33333333", False),
        ("1000100", "1000000", True),  # relative
        ("1002000", "1000000", False),
        ("yes 1.0", "yes  1.00001", True),
        ("no 1.0", "yes 1.0", False),
        ("1", "1 2", False),
        ("1 2", "1", False),
        ("1\n1", "1", False),
        ("nan", "1", False),
        ("inf", "1e300", False),
        ("inf", "inf", True),
        ("1_0", "10", False),
        ("٣", "3", False),
        ("1e0", "1", True),
    ],
)
def test_tolerance(printed: str, expected: str, same: bool) -> None:
    assert same_output(printed, expected, tolerance=1e-3) is same
