"""`megatron-r1 tokenizer train`, and `Tokenizer`, through which everything else reads one.

Training is sentencepiece's BPE with byte fallback and no normalisation. What is written is a Hugging Face
folder (`tokenizer.json`, `tokenizer_config.json`) that transformers and vLLM load, with sentencepiece's own
`tokenizer.model` beside it; both give the same ids.

Two conventions hold everywhere: a prompt is `[bos] + ids`, a document `[bos] + ids + [eos]`. A piece holds a
space only at its start, so cutting a text before a space does not change its tokens: a prompt and a response
that starts with a space tokenize apart as they do together.
"""

import io
import random
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model
from tokenizers import AddedToken, decoders, models, processors
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_r1.config.runs import TokenizerConfig
from megatron_r1.data.files import aside, documents, write_json
from megatron_r1.errors import ConfigError, DataError

UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"
_SPACE = "▁"
"""What sentencepiece's trainer writes for a space."""
_RESERVED = re.compile("[\0\t\r\n\u2581\u2585]+")
"""Characters that sentencepiece's trainer keeps for itself or drops a whole sentence over; they are left to the
byte tokens."""
_LONGEST = 1 << 20
"""Bytes of the longest sentence for training; sentencepiece would drop a longer one."""
_BROKEN = "\ufffd"
"""What the bytes of a character decode to until its last is there."""
_CONTEXT = 4
"""Tokens before a token that may change how it is written: a space at the start of a text is left out."""


class Tokenizer:
    """A Hugging Face tokenizer reduced to what the trainer needs."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
        self.path = path
        self._tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise DataError(f"the tokenizer in {path} has no end-of-sequence token; set `eos_token`")
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int = tokenizer.eos_token_id
        self.pad_id: int = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.vocab_size: int = len(tokenizer)
        """Ids are below this; a model's embedding has at least as many rows."""

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read the tokenizer of a Hugging Face folder.

        Raises:
            DataError: no such folder, no tokenizer in it, or one that does not load.
        """
        if not (path / "tokenizer.json").is_file():
            raise DataError(f"{path} holds no tokenizer.json; `megatron-r1 tokenizer train` writes such a folder")
        try:
            return cls(AutoTokenizer.from_pretrained(path, local_files_only=True), path)
        except DataError:
            raise
        except Exception as error:  # the parsers below raise bare Exceptions
            raise DataError(f"the tokenizer in {path} does not load: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, no special tokens added. [tokens]"""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of many texts at once."""
        if not isinstance(self._tokenizer, PreTrainedTokenizerFast):
            slow: list[list[int]] = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
            return slow
        # What transformers' own call does besides (offsets, masks) takes almost as long as the tokenizer itself.
        backend = self._tokenizer.backend_tokenizer
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        if backend.encode_special_tokens != self._tokenizer.split_special_tokens:
            backend.encode_special_tokens = self._tokenizer.split_special_tokens
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def id_of(self, token: str) -> int | None:
        """The id of one token, None if the vocabulary has no such."""
        found: int | None = self._tokenizer.get_vocab().get(token)
        return found

    def beginning_as_the_end_of(self, text: str) -> tuple[int, ...]:
        """The token that `text` ends with, and longer ones that begin with it, as ">=" does with ">"."""
        last: str = self._tokenizer.convert_ids_to_tokens(self.encode(text)[-1])
        return tuple(sorted(number for token, number in self._tokenizer.get_vocab().items() if token.startswith(last)))

    @property
    def added(self) -> frozenset[str]:
        """Texts that are one token wherever they stand, such as those that begin and end a turn."""
        return frozenset(self._tokenizer.get_added_vocab())

    def encode_prompt(self, text: str) -> list[int]:
        """What the policy continues: [bos] + ids. [tokens]"""
        return self._begin() + self.encode(text)

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        """What pretraining reads: [bos] + ids + [eos] of each text."""
        return [self._begin() + ids + [self.eos_id] for ids in self.encode_batch(texts)]

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; begin, end and padding tokens are left out, user-defined tags are kept."""
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def pieces(self, ids: list[int]) -> list[str]:
        """What each token adds to the text: joined, they are `decode(ids)`. [tokens]

        A character that several byte tokens share stands at the last of them; a begin, end or padding token adds "".
        """
        found, whole, start, known = [], [0], 0, ""
        for end in range(1, len(ids) + 1):
            # Only the tokens since the last whole character and the few before it decide what the next one adds.
            text = self.decode(ids[start:end])
            if text.endswith(_BROKEN) and end < len(ids):
                found.append("")
                continue
            found.append(text.removeprefix(known))
            whole.append(end)
            start = max(whole[-_CONTEXT:][0], start)  # bytes of one character must not be parted
            known = self.decode(ids[start:end])
        return found

    def _begin(self) -> list[int]:
        return [] if self.bos_id is None else [self.bos_id]


def train(config: TokenizerConfig) -> dict[str, Any]:
    """Train a tokenizer and write its folder.

    Returns:
        Vocabulary size, documents read, and tokens a character on the first of them.

    Raises:
        DataError: an input is missing, empty or malformed, or too small for the vocabulary.
        ConfigError: special tokens that clash.
    """
    taken = {UNK, BOS, EOS, PAD}
    for token in config.special_tokens:
        if token in taken or not token or token != token.strip():
            raise ConfigError(f"special token {token!r} is empty, padded with spaces, given twice or built in")
        taken.add(token)
    texts = _sample(config)
    model = _train_model(texts, config)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    with aside(config.output / "tokenizer.model") as partial:
        partial.write_bytes(model.SerializeToString())
    fast = _fast_tokenizer(model)
    _write_fast(fast, config.output)
    measured = texts[:1000]
    tokens = sum(len(encoding.ids) for encoding in fast.encode_batch(measured, add_special_tokens=False))
    summary = {
        "vocab_size": len(model.pieces),
        "documents": len(texts),
        "tokens_per_character": round(tokens / sum(map(len, measured)), 4),
    }
    write_json(config.output / "summary.json", summary)
    return summary


def _sample(config: TokenizerConfig) -> list[str]:
    """At most `max_documents` documents, a uniform choice (reservoir sampling: one pass, bounded memory)."""
    rng = random.Random(config.seed)
    kept: list[str] = []
    for number, text in enumerate(text for path in config.input for text in documents(path)):
        if number < config.max_documents:
            kept.append(text)
        elif (slot := rng.randrange(number + 1)) < config.max_documents:
            kept[slot] = text
    if not kept:
        raise ConfigError("`input` names no file")
    return kept


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for part in _RESERVED.split(text):
            for start in range(0, len(part), _LONGEST // 4):
                yield part[start : start + _LONGEST // 4]


def _train_model(texts: list[str], config: TokenizerConfig) -> Any:
    """The trained sentencepiece `ModelProto`, its pieces holding real spaces."""
    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=buffer,
            model_type="bpe",
            vocab_size=config.vocab_size,
            byte_fallback=True,
            character_coverage=1.0 if config.vocab_size < 4096 else 0.9999,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=config.split_digits,
            user_defined_symbols=config.special_tokens,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            unk_piece=UNK,
            bos_piece=BOS,
            eos_piece=EOS,
            pad_piece=PAD,
            max_sentence_length=_LONGEST,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].strip()
        raise DataError(
            f"sentencepiece cannot make {config.vocab_size} tokens of {', '.join(map(str, config.input))} "
            f"({len(texts):,} documents; {len(config.special_tokens)} special tokens, 4 of its own and 256 byte tokens "
            f"included): {reason}"
        ) from error
    model = sentencepiece_model.ModelProto()
    model.ParseFromString(buffer.getvalue())
    # The trainer stands U+2581 for a space; with real spaces instead, U+2581 itself survives the round trip.
    for piece in model.pieces:
        piece.piece = piece.piece.replace(_SPACE, " ")
    model.normalizer_spec.escape_whitespaces = False
    return model


def _fast_tokenizer(model: Any) -> FastTokenizer:
    """The same tokenizer for the tokenizers library."""
    kinds = sentencepiece_model.ModelProto.SentencePiece
    ids = {piece.piece: number for number, piece in enumerate(model.pieces)}
    mergeable = {piece.piece: number for number, piece in enumerate(model.pieces) if piece.type == kinds.NORMAL}
    # Sentencepiece merges any two neighbours whose concatenation is a piece, earlier pieces first.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in mergeable
        for cut in range(1, len(piece))
        if piece[:cut] in mergeable and piece[cut:] in mergeable
    ]
    fast = FastTokenizer(models.BPE(ids, merges, unk_token=UNK, byte_fallback=True, fuse_unk=False))
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    fast.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (UNK, BOS, EOS, PAD)])
    tags = [piece.piece for piece in model.pieces if piece.type == kinds.USER_DEFINED]
    fast.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in tags])
    fast.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, ids[BOS])]
    )
    return fast


def _write_fast(fast: FastTokenizer, folder: Path) -> None:
    # split_special_tokens: "</s>" in a text is four characters, never the end of a document.
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )
    partial = folder / ".partial"
    try:
        wrapped.save_pretrained(partial)
        for file in sorted(partial.iterdir()):
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
