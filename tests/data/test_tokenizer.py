import json
import random
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_r1.config.runs import TokenizerConfig
from megatron_r1.data.tokenizer import Tokenizer, train
from megatron_r1.errors import ConfigError, DataError
from tests.data.small_corpus import TAGS, tokenizer_config

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<0x41>", "\u2581", "\u2585"]
WORDS = ["State", "the", " final", "answer", "arithmetic", "Assistant:", "User", "problem", "wait", "check", "maybe"]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
CORPUS_LIKE = st.lists(
    st.one_of(
        st.sampled_from(WORDS + TAGS + SPECIAL + [" ", "  ", "\n", "\t"]), st.text("aeimnorst <>/=-+0123", max_size=8)
    )
).map("".join)


@pytest.fixture(scope="module")
def reference(tokenizer_folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_folder / "tokenizer.model"))


@settings(max_examples=400, deadline=None)
@given(text=st.one_of(ANY_TEXT, CORPUS_LIKE))
@example(text="\0")
@example(text=" \u2581 a\u0301 \U0001f468\u200d\U0001f469\u200d\U0001f467 \r\n\t\x7f\ufeff\uffff  ")
@example(text="<s>a</s><pad><unk><think></answer>")
def test_any_text_survives_and_both_formats_agree(
    text: str, tokenizer: Tokenizer, reference: sentencepiece.SentencePieceProcessor
) -> None:
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text)
    assert tokenizer.decode(ids) == text
    assert reference.decode(ids) == text


def test_transformers_loads_the_folder_as_it_stands(tokenizer_folder: Path, tokenizer: Tokenizer) -> None:
    loaded = AutoTokenizer.from_pretrained(tokenizer_folder)
    text = "  3 + 4\n\n <think>é\u0301</think>  "
    assert loaded(text)["input_ids"] == [tokenizer.bos_id, *tokenizer.encode(text)]
    assert loaded.decode(loaded.encode(text), skip_special_tokens=True) == text


def test_text_never_becomes_a_special_token_and_tags_stay_whole(tokenizer: Tokenizer) -> None:
    special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    assert len(special) == 3
    assert not special & set(tokenizer.encode("<s> </s> <pad>"))
    assert [len(tokenizer.encode(tag)) for tag in TAGS] == [1, 1, 1, 1]


def test_decode_drops_special_tokens_and_keeps_tags(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode_prompt(" <think>3</think>"), tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode(ids) == " <think>3</think>"


def test_prompt_and_response_tokenize_apart_as_together(corpus: Path, tokenizer: Tokenizer) -> None:
    for line in (corpus / "train.jsonl").read_text().splitlines()[:300]:
        text = json.loads(line)["text"]
        cut = text.index("Assistant:") + len("Assistant:")
        assert text[cut] == " "
        [document] = tokenizer.encode_documents([text])
        prompt = tokenizer.encode_prompt(text[:cut])
        assert document == [*prompt, *tokenizer.encode(text[cut:]), tokenizer.eos_id]
        assert document[0] == tokenizer.bos_id


def test_training_again_gives_the_same_bytes(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    train(tokenizer_config(corpus, tmp_path))
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (tokenizer_folder / name).read_bytes()


def test_real_text_with_newlines_and_long_lines(tmp_path: Path) -> None:
    rng = random.Random(0)
    words = ["größe", "naïve", "日本", "def f(x):\n\treturn x\n", "▁▁", "12345", "  "]
    text = " ".join(rng.choice(words) for _ in range(3000))
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": text}) + "\n")
    train(TokenizerConfig(input=[tmp_path / "in.jsonl"], output=tmp_path / "out", vocab_size=310))
    tokenizer = Tokenizer.load(tmp_path / "out")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out" / "tokenizer.model"))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text) == processor.encode(text)
    assert len(tokenizer.encode("12345")) == 5


def test_a_sample_of_the_documents_is_enough(corpus: Path, tmp_path: Path) -> None:
    config = tokenizer_config(corpus, tmp_path, vocab_size=340).model_copy(update={"max_documents": 100})
    assert train(config)["documents"] == 100


@pytest.mark.parametrize(("vocab_size", "reason"), [(100, "smaller than required"), (5000, "too high")])
def test_a_vocabulary_that_does_not_fit_the_corpus(corpus: Path, tmp_path: Path, vocab_size: int, reason: str) -> None:
    with pytest.raises(DataError, match=rf"cannot make {vocab_size} tokens .*{reason}"):
        train(tokenizer_config(corpus, tmp_path, vocab_size=vocab_size))


def test_special_tokens_that_clash(corpus: Path, tmp_path: Path) -> None:
    config = tokenizer_config(corpus, tmp_path).model_copy(update={"special_tokens": ["<s>"]})
    with pytest.raises(ConfigError, match="'<s>'"):
        train(config)


def test_missing_and_broken_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no tokenizer\.json"):
        Tokenizer.load(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="does not load"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "text", ["3 + 4 = 7, 先 7-2=5 wait", " 🎈 über <think>x</think>", "日本語 mixed with 漢字🎈🎈"]
)
def test_pieces_join_to_the_text(tokenizer, text):
    ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    pieces = tokenizer.pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert pieces[0] == pieces[-1] == ""


def test_pieces_of_a_broken_character(tokenizer):
    ids = tokenizer.encode("7 🎈")[:-1]
    assert "".join(tokenizer.pieces(ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("split", [True, False])
def test_a_batch_is_what_transformers_makes_of_each_text(tokenizer_folder: Path, split: bool) -> None:
    """Whatever truncation and padding the file asks for, and whether or not special tokens in a text count."""
    theirs = AutoTokenizer.from_pretrained(tokenizer_folder)
    theirs.split_special_tokens = split
    texts = ["", "  3 + 4</s><pad>", "<think>\u00e9 </think>" * 9, *SPECIAL]
    expected = [theirs.encode(text, add_special_tokens=False) for text in texts]
    ours = Tokenizer(theirs, tokenizer_folder)
    theirs.backend_tokenizer.enable_truncation(4)
    theirs.backend_tokenizer.enable_padding(length=64)
    theirs.backend_tokenizer.encode_special_tokens = not split
    assert ours.encode_batch(texts) == expected
    assert (ours.eos_id in expected[1]) != split
    assert ours.encode_documents(["a"]) == [[ours.bos_id, *ours.encode("a"), ours.eos_id]]


def test_the_id_of_a_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.id_of("</s>") == tokenizer.eos_id
    assert tokenizer.id_of("<think>") == tokenizer.encode("<think>")[0]
    assert tokenizer.id_of("<nothing>") is None


def test_tokens_at_which_a_text_may_end(tokenizer: Tokenizer) -> None:
    vocabulary = tokenizer._tokenizer.get_vocab()
    assert tokenizer.beginning_as_the_end_of("so </think>") == (tokenizer.id_of("</think>"),)
    last = tokenizer.encode("so")[-1]
    piece = next(token for token, number in vocabulary.items() if number == last)
    found = tokenizer.beginning_as_the_end_of("so")
    assert last in found
    assert set(found) == {number for token, number in vocabulary.items() if token[: len(piece)] == piece}
    assert {"</think>", "</s>"} <= tokenizer.added
    assert piece not in tokenizer.added
