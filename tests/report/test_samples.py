from megatron_r1.report.samples import sample_rows
from megatron_r1.types import Group, Question, Sample


def test_tokens_are_kept_where_their_texts_are_asked_for() -> None:
    sample = Sample([5, 6], [-0.12345678, -0.2], "ab", True, 0)
    question = Question("q", "sums", "User: 1 + 1? Assistant:", "2", {"text": "1 + 1?"})
    (plain,) = sample_rows(0, [Group(question, [1], [sample])], "train")
    assert plain["question"] == "1 + 1?"
    assert "pieces" not in plain["responses"][0]
    (row,) = sample_rows(0, [Group(question, [1], [sample])], "train", lambda ids: [chr(92 + i) for i in ids])
    kept = row["responses"][0]
    assert (kept["pieces"], kept["engine_logprobs"], kept["trainer_logprobs"]) == (["a", "b"], [-0.1234568, -0.2], None)
    sample.trainer_logprobs = [-0.25, -0.5]
    (row,) = sample_rows(0, [Group(question, [1], [sample])], "train", lambda ids: ["", ""])
    assert row["responses"][0]["trainer_logprobs"] == [-0.25, -0.5]
