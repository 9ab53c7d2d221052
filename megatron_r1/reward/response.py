"""How a response is laid out: `<think>` reasoning `</think>` `<answer>` answer `</answer>`."""

import re

_TAG = re.compile(r"(</?(?:think|answer)>)")


def segments(text: str) -> list[str]:
    """`text` cut at its tags: text, tag, text, tag, ... text (odd length, texts may be empty)."""
    return _TAG.split(text)


def extract_answer(text: str) -> str | None:
    """What stands in the last `<answer>` pair that follows a closed think block, or None without such a pair."""
    parts = segments(text)
    tags, inner = parts[1::2], parts[2::2]
    answer, opened, thought = None, False, False
    for number, tag in enumerate(tags):
        if tag == "<think>":
            opened, thought = True, False
        elif tag == "</think>":
            thought = opened
        elif tag == "<answer>" and thought and tags[number + 1 : number + 2] == ["</answer>"]:
            answer = inner[number].strip()
    return answer
