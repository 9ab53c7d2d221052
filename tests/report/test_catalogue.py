import math

import pytest

from megatron_r1.report.catalogue import duration, show


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("accuracy", 0.5, "50.0 %"),
        ("kl", 0.00123, "1.23e-03"),
        ("kl", 0.0, "0"),
        ("tokens_per_second", 12345.6, "12,346"),
        ("response_length", 9.25, "9.2"),
        ("loss", 2.34567, "2.346"),
        ("loss", 2e-5, "2.00e-05"),
        ("unheard_of", 1.0, "1.000"),
        ("loss", math.nan, "n/a"),
        ("loss", None, "n/a"),
    ],
)
def test_show(name, value, text):
    assert show(name, value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (4.2, "4.2 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 05 min"),
        (3 * 86400 + 4 * 3600, "3 d 04 h"),
        (3599.7, "1 h 00 min"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
