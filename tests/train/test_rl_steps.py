from megatron_r1.train.collector import by_token


def test_a_step_ends_in_the_token_that_holds_its_last_character() -> None:
    pieces = ["", "3+", "4", "=7,", " 7", "+1=8", ""]
    marks = [(5, 1.0), (12, 0.0)]  # "3+4=7" and ", 7+1=8"
    assert "".join(pieces)[:5] == "3+4=7"
    assert by_token(marks, pieces) == [(3, 1.0), (5, 0.0)]
    assert by_token([], pieces) == []
