"""Groups that every reward has to cope with: each kind of question, answered well, badly, strangely and not at all."""

from megatron_r1.types import Group, Question, Sample

RESPONSES = (
    "<think>First, 2 + 3 = 5.</think> <answer>5</answer>",
    "<think>First, 2 + 3 = 6.</think> <answer>6</answer>",
    "<think>\nStep 1: add.\nStep 2: wait, check.\n</think>\n<answer>\n\\boxed{B}\n</answer>",
    "<think>def</think> <answer>\n```python\ndef add(a, b):\n    return a + b\n```\n</answer>",
    "",
    "5",
    "<think>" + "again and " * 200 + "</think> <answer>5</answer>",
    "<think>\u4e8c\u52a0\u4e09\u7b49\u4e8e\u4e94\u3002</think> <answer>\uff15</answer>",
    "</think><answer></answer><think>\x00\ufffd\u202e{{%s}}\\frac{",
)
QUESTIONS = (
    Question("math-0", "math", "What is 2 + 3?", "5", {"text": "What is 2 + 3?"}),
    Question("stem-0", "stem", "2 + 3?", "B", {"text": "2 + 3?", "choices": ["4", "5", "6", "7"]}),
    Question(
        "code-0", "code", "Write add.", "", {"text": "Write add.", "tests": {"asserts": ["assert add(2, 3) == 5"]}}
    ),
    Question(
        "chain_sum-0",
        "reasoning_gym",
        "2 + 3 =",
        "5",
        {"config": {"dataset": "chain_sum"}, "entry": {"question": "2 + 3 =", "answer": "5", "metadata": {}}},
    ),
    Question("general-0", "general", "Say something.", "", {"text": "Say something."}),
)


def group(question: Question, responses: tuple[str, ...] = RESPONSES) -> Group:
    """Samples with token ids, lengths and verdicts of their own, as a judge hands them to a reward."""
    samples = [
        Sample([7] * (1 + len(text) // 4), [-0.5] * (1 + len(text) // 4), text, True, 0, correct=verdict)
        for text, verdict in zip(responses, (True, False, None) * len(responses), strict=False)
    ]
    return Group(question, [1, 2, 3], samples)
