"""The folder of encoded examples: what it gives back, when it is written anew, what it refuses."""

from pathlib import Path

import pytest

from megatron_r1.config.sft import ChatsSection
from megatron_r1.data.chats import Chats
from megatron_r1.data.encoded_chats import EncodedChats, encode
from megatron_r1.data.files import write_lines
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError
from tests.data.chat_rows import row, source, write_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("encoded")))


def encoded(folder: Path, tokenizer: Tokenizer, *sources: ChatsSection, strict: bool = True) -> EncodedChats:
    encode(sources, tokenizer, folder / "cache", max_length=60, strict=strict)
    return EncodedChats(folder / "cache")


def test_examples_come_back_as_they_were_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = source(tmp_path, *(row(number) for number in range(20)))
    chats = encoded(tmp_path, tokenizer, data)
    expected = list(Chats(tokenizer, 60).read(data))
    assert len(chats) == 20
    for number, example in enumerate(expected):
        assert chats.tokens(number) == example.prompt + example.response
        assert chats.response_length(number) == len(example.response)


def test_the_table_counts_by_domain(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [row(1, response=" 3"), row(1, response=" 3 3"), row(2, response=" 4")]
    chats = encoded(tmp_path, tokenizer, source(tmp_path, *rows))
    prompt, (short, long) = (
        len(tokenizer.encode_prompt(rows[0]["prompt"])),
        (len(tokenizer.encode(text)) + 1 for text in (" 3", " 3 3")),
    )
    table = chats.table([0, 1, 2])
    assert table["math"] == {
        "rows": 2,
        "mean_tokens": prompt + (short + long) / 2,
        "mean_response_tokens": (short + long) / 2,
    }
    assert table["logic"]["rows"] == 1
    assert set(chats.table([2])) == {"logic"}


def test_the_held_out_share_takes_whole_prompts_wherever_they_stand(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [row(number % 100, response=f" {number}") for number in range(300)]
    chats = encoded(tmp_path, tokenizer, source(tmp_path, *rows))
    (kept,), (heldout,) = (chats.part(0.3, chosen, sources=1) for chosen in (False, True))
    assert sorted(kept + heldout) == list(range(300))
    prompts = {number % 100 for number in heldout}
    assert not prompts & {number % 100 for number in kept}
    assert 15 <= len(prompts) <= 45
    assert chats.part(0.0, True, 1) == [[]]
    write_lines(tmp_path / "chats.jsonl", rows[::-1])
    turned = encoded(tmp_path, tokenizer, ChatsSection(path=str(tmp_path / "chats.jsonl")))
    assert {(299 - number) % 100 for number in turned.part(0.3, True, 1)[0]} == prompts


def test_parts_are_by_source(tokenizer: Tokenizer, tmp_path: Path) -> None:
    first, second = (source(tmp_path / name, row(1), row(2), row(3)) for name in "ab")
    chats = encoded(tmp_path, tokenizer, first, second)
    assert chats.part(0.0, False, 2) == [[0, 1, 2], [3, 4, 5]]


def test_it_is_written_once_and_anew_when_the_data_changes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = source(tmp_path, row(1), row(2))
    digest = encoded(tmp_path, tokenizer, data).digest
    marker = tmp_path / "cache/marker"
    marker.touch()
    assert encoded(tmp_path, tokenizer, data).digest == digest
    assert marker.exists()
    source(tmp_path, row(1), row(3))
    assert encoded(tmp_path, tokenizer, data).digest != digest
    assert not marker.exists()
    (tmp_path / "cache/about.json").unlink()  # as a run leaves it that was killed
    source(tmp_path, row(1), row(2))
    assert encoded(tmp_path, tokenizer, data).digest == digest


def test_the_digest_sees_where_a_prompt_ends(tokenizer: Tokenizer, tmp_path: Path) -> None:
    digests = set()
    for prompt, response in (("a b", " c"), ("a", " b c")):
        chats = encoded(tmp_path, tokenizer, source(tmp_path, {"prompt": prompt, "response": response}))
        digests.add((chats.digest, tuple(chats.tokens(0))))
    assert len({tokens for _, tokens in digests}) == 1
    assert len(digests) == 2


def test_bad_rows_stop_or_are_left_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [row(1), *(row(2, response="</think>") for _ in range(7)), row(3, response=" 1" * 100)]
    data = source(tmp_path, *rows)
    with pytest.raises(DataError, match=r"7 of 9 rows .*line 2: .*line 6: <think> .* \.\.\.\. Mend them.*bad_rows"):
        encoded(tmp_path, tokenizer, data)
    assert not list(tmp_path.glob("cache*"))
    chats = encoded(tmp_path, tokenizer, data, strict=False)
    assert len(chats) == 1
    assert chats.audit.problems == {"<think> and </think> do not match": 7, "longer than max_length": 1}


def test_nothing_left_to_train_on_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = source(tmp_path, row(1, response=" 1" * 100), row(2, response="</think>"))
    with pytest.raises(DataError, match=r"no row is left .* 2, 1 longer than max_length, 1 <think>.*max_length is 60"):
        encoded(tmp_path, tokenizer, data, strict=False)
