import pytest

from megatron_r1.curate.layout import check, continuation, fill, lacking, parts
from megatron_r1.data.templates import render
from megatron_r1.errors import ConfigError
from megatron_r1.types import Question

QUESTION = Question("q", "math", "User: 2 + 3? Assistant:", "5", {"text": "2 + 3?"})
TAGGED = " <think>two, three: \\{five}</think> <answer>5</answer>"
CHAT = "<think>\n{reasoning}\n</think>\n\n{summary}"


def test_the_parts_of_a_response() -> None:
    assert parts(QUESTION, TAGGED) == {
        "question": "2 + 3?",
        "reasoning": "two, three: \\{five}",
        "summary": "5",
        "answer": "5",
        "reference": "5",
        "response": TAGGED,
    }


@pytest.mark.parametrize(
    ("response", "reasoning", "summary", "answer"),
    [
        ("<think>a</think>\n\nThe sum is \\boxed{5}.", "a", "The sum is \\boxed{5}.", "5"),
        ("<think>a</think>\nI say <answer>\\boxed{5}</answer>", "a", "I say \\boxed{5}", "5"),
        ("Five.", "", "Five.", "Five."),
        ("It is \\boxed{5}", "", "It is \\boxed{5}", "5"),
        ("<think>never closed", "never closed", "", ""),
    ],
)
def test_parts_of_other_forms(response: str, reasoning: str, summary: str, answer: str) -> None:
    found = parts(QUESTION, response)
    assert (found["reasoning"], found["summary"], found["answer"]) == (reasoning, summary, answer)


def test_filling_in_is_done_once_and_leaves_other_braces_alone() -> None:
    values = {"reasoning": "{answer}", "answer": "5"}
    assert fill("{reasoning} \\boxed{{answer}} {x}", values) == "{answer} \\boxed{5} {x}"
    assert lacking("{reasoning}{answer}", values | {"answer": ""}) == ["answer"]


def test_a_layout_without_placeholders() -> None:
    with pytest.raises(ConfigError, match=r"it has no placeholder.*\{reasoning\}"):
        check("<think></think>", "it")
    check("{text}", "it", "text")


@pytest.mark.parametrize(
    ("template", "response", "whole"),
    [
        ("r1_zero_short", "<think>a</think>5", "<think>a</think>5"),
        ("r1_chat", "<think>\na\n</think>\n\n5", "<think>\na\n</think>\n\n5"),
        ("r1_chat", "<think>a</think>5", "<think>\na</think>5"),
        ("r1_chat", "Hello!", "<think>\n\n</think>\n\nHello!"),
        ("{question}<think>", "<think>a</think>5", "<think>a</think>5"),
    ],
)
def test_prompt_and_continuation_open_the_reasoning_once(template: str, response: str, whole: str) -> None:
    prompt = render(template, "2 + 3?")
    together = prompt + continuation(prompt, response)
    opening = prompt.removesuffix("<think>\n").removesuffix("<think>")
    assert together == opening + whole


def test_from_tags_to_the_chat_layout() -> None:
    prompt = render("r1_chat", "2 + 3?")
    laid = fill(CHAT, parts(QUESTION, TAGGED))
    assert prompt + continuation(prompt, laid) == (
        "<｜User｜>2 + 3?<｜Assistant｜><think>\ntwo, three: \\{five}\n</think>\n\n5"
    )
