from megatron_r1.wording import counted


def test_one_is_no_plural() -> None:
    assert counted(1, "engine") == "1 engine"
    assert counted(0, "engine") == "0 engines"
    assert counted(2048, "GPU") == "2,048 GPUs"
    assert [counted(number, "process", "processes") for number in (1, 2)] == ["1 process", "2 processes"]
