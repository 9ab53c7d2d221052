"""How messages put numbers."""


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """`counted(1, "engine")` -> "1 engine", `counted(2048, "GPU")` -> "2,048 GPUs".

    `plural`: where it is not the noun and an s.
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
