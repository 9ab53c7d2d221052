"""Random responses, many made of what the parsers look for: no crash, no hang, and always a score in range."""

from datetime import timedelta

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.config import component
from megatron_r1.reward.claims import MAX_CLAIMS, boxes, claims, tidy
from megatron_r1.reward.numerals import numeral, same
from megatron_r1.reward.response import extract_answer, segments, split_reasoning
from megatron_r1.types import Group, Question, Sample

PIECES = [
    "<think>", "</think>", "<answer>", "</answer>", r"\boxed{", r"\fbox{", "}", "{", "$", "$$", r"\(", r"\)", r"\[",
    r"\]", r"\frac", r"\frac{1}{2}", r"\sqrt", "^", "_", "=", ",", ";", "+", "-", "*", "/", "(", ")", "[", "]", "|",
    "!", "%", ".", "0", "1", "2", "3", "12", "999", "x", "y", "e", "i", " or ", " and ", "answer is ", r"\text{",
    r"\pi",
    r"\infty", r"\cup", r"\le", "<", ">", r"\pm", r"\approx", r"\circ", r"\%", "\\", "\n", " ", "A", "B", "(C)",
    "three", "٣", "½", "²", "х", "−", "∞", "\u200b", "\x00", "\ud7ff", "𝟛",
]  # fmt: skip
noise = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=14).map("".join),
    st.text(max_size=60),
    st.from_regex(r"[-+]?[0-9]{1,9}([.,/:][0-9]{1,9})?( ?%|e[0-9]{1,4})?", fullmatch=True),
)
responses = st.one_of(
    noise, noise.map("<think>a</think> <answer>{}</answer>".format), noise.map("<think>a</think>".__add__)
)
quick = settings(max_examples=150, deadline=timedelta(seconds=5))
slow = settings(max_examples=60, deadline=timedelta(seconds=30))
CHOICES = ["one", "x", "", "1/2", "A"]


def in_range(kind: str, reference: str, text: str, **config: object) -> None:
    reward = component.build("reward", {"type": kind, **config})
    question = Question("0", "none", "q", reference, {"choices": CHOICES})
    for score in reward(Group(question, [], [Sample([], [], text, True, 0)])):
        assert score is None or (isinstance(score, float) and 0.0 <= score <= 1.0)


@quick
@given(responses)
def test_layout(text: str) -> None:
    assert "".join(segments(text)) == text
    reasoning, after = split_reasoning(text)
    assert after is None or f"<think>{reasoning}</think>{after}" in text
    for answer in (extract_answer(text, "tags"), extract_answer(text, "after_think")):
        assert answer is None or (answer in text and answer == answer.strip())


@quick
@given(noise)
def test_claims(text: str) -> None:
    found = claims(text)
    assert len(found) <= MAX_CLAIMS
    assert all(found)
    assert all(part in text for part in boxes(text) or [])
    number = numeral(tidy(text))
    assert number is None or same(number, number)


@quick
@given(responses)
def test_format(text: str) -> None:
    in_range("format", "3", text)
    in_range("format", "3", text, answer_in="after_think")
    in_range("format", "3", text, compatible="open-r1")


@quick
@given(st.sampled_from("ABCDEF"), responses)
def test_multiple_choice(reference: str, text: str) -> None:
    in_range("multiple_choice", reference, text)


@slow
@given(st.sampled_from(["3", "1/2", "50%", r"\text{one}", "x+1", "1, 2", "(1,2]", "x=3", "x>2", r"\pi"]), responses)
def test_accuracy(reference: str, text: str) -> None:
    in_range("accuracy", reference, text)


@slow
@given(noise, st.sampled_from(["3", r"\boxed{x}", "x=1", r"\{1, 2\}"]))
def test_any_reference(reference: str, answer: str) -> None:
    in_range("accuracy", reference, f"<think>a</think> <answer>{answer}</answer>")


@slow
@given(responses)
def test_open_r1(text: str) -> None:
    in_range("accuracy", "3", text, compatible="open-r1")
