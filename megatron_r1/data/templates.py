"""Prompt templates: the text around a question that a base model continues."""

from megatron_r1.errors import ConfigError, nearest

_ZERO = (
    "What follows is a conversation between a User and an Assistant. The User asks a question and the Assistant "
    "solves it. The Assistant first works through the reasoning in its mind and only then gives the User the "
    "answer. The reasoning stands inside <think> </think> tags and the answer inside <answer> </answer> tags, "
    "like this: <think> the reasoning comes here </think> <answer> the answer comes here </answer>. "
)
_BOXED = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."

TEMPLATES: dict[str, str] = {
    # DeepSeek-R1 (arXiv 2501.12948), table 1: states the form of the response and nothing about how to reason.
    "r1_zero": _ZERO + "User: {question}. Assistant:",
    # For models whose context or capacity the paragraph above would fill.
    "r1_zero_short": "User: {question} Assistant:",
    # Programs: the answer is a block of code, and a problem ends as it likes.
    "r1_zero_code": _ZERO
    + "An answer that is a program is one block of code between ``` fences, whose first line names the language. "
    "User: {question}\nAssistant:",
    # DeepSeek-R1 and the models distilled from it; the begin-of-sequence token is added with the token ids. The
    # response begins inside the reasoning (usage advice of the R1 repository).
    "r1_chat": "<｜User｜>{question}<｜Assistant｜><think>\n",
    # The same with the advice for mathematics.
    "r1_chat_boxed": f"<｜User｜>{_BOXED}<｜Assistant｜><think>\n",
    # Base models that were not trained on any chat.
    "boxed": f"User: {_BOXED}\n\nAssistant:",
}


def render(template: str, question: str) -> str:
    """The prompt for `question`.

    Args:
        template: a name in `TEMPLATES`, or a text with `{question}` in it.
        question: the bare question.

    Raises:
        ConfigError: neither a known name nor a text with `{question}`.
    """
    text = TEMPLATES.get(template, template)
    if "{question}" not in text:
        raise ConfigError(
            f"template {template!r} is neither a known name{nearest(template, TEMPLATES)} "
            f"(known: {', '.join(TEMPLATES)}) nor a text with '{{question}}' in it"
        )
    # Not str.format: questions and templates may hold braces of their own.
    return text.replace("{question}", question)
