from megatron_r1.config import component
from megatron_r1.types import Group, Question, Sample


def test_one_score_a_sample() -> None:
    samples = [Sample([], [], text, True, 0) for text in (" <think>a</think> <answer>5</answer>", "5")]
    reward = component.build("reward", {"type": "format"})
    assert reward(Group(Question("0", "none", "q", "5"), [], samples)) == [1.0, 0.0]
