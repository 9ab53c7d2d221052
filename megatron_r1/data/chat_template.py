"""A tokenizer's chat template, and the proof that it fits the tokenizer before anything is trained with it."""

from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer

from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError

Messages = Sequence[dict[str, Any]]
"""`[{"role": "user", "content": "..."}, ...]`"""

_QUESTION = {"role": "user", "content": "?"}
_PROBE = "f7bac0d9"
"""An answer that no template holds itself."""


class ChatTemplate:
    """The template in a tokenizer's folder, audited.

    Raises:
        DataError: there is none; it gives no begin-of-sequence token where the tokenizer has one, or two of them; or it
            ends an assistant's turn with something else than the end-of-sequence token.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._hf = _load(tokenizer)
        self._path = tokenizer.path
        if not self._hf.chat_template:
            raise DataError(
                f"{self._path} has no chat template, which rows of `messages` need: add chat_template.jinja there, or "
                "give the rows as `prompt` and `response`"
            )
        self._audit_begin(tokenizer)
        self._audit_end(tokenizer)

    def prompt(self, messages: Messages) -> str:
        """The text after which the assistant answers `messages`."""
        text: str = self._hf.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return text

    def _audit_begin(self, tokenizer: Tokenizer) -> None:
        if tokenizer.bos_id is None:
            return
        text = self.prompt([_QUESTION])
        ids = tokenizer.encode(text)
        begins = next((number for number, token in enumerate(ids) if token != tokenizer.bos_id), len(ids))
        if begins == 1:
            return
        bos = self._hf.bos_token
        if begins > 1:
            raise DataError(f"the chat template of {self._path} begins with {bos!r} {begins} times: {text[:80]!r}")
        if text.startswith(bos):
            raise DataError(
                f"the tokenizer in {self._path} cuts the {bos!r} of its chat template into {tokenizer.encode(bos)}: "
                "set split_special_tokens to false in tokenizer_config.json"
            )
        raise DataError(
            f"the chat template of {self._path} drops the begin-of-sequence token: it begins with {text[:40]!r}; put "
            f"{{{{ bos_token }}}} ({bos!r}) at its start"
        )

    def _audit_end(self, tokenizer: Tokenizer) -> None:
        turns = [_QUESTION, {"role": "assistant", "content": _PROBE}]
        text: str = self._hf.apply_chat_template(turns, tokenize=False)
        before, found, tail = text.rpartition(_PROBE)
        if not found:
            raise DataError(f"the chat template of {self._path} leaves out what the assistant says: {before + tail!r}")
        if tokenizer.encode(tail.lstrip())[:1] != [tokenizer.eos_id]:
            raise DataError(
                f"the chat template of {self._path} ends an assistant's turn with {tail!r}, but responses are trained "
                f"to end with the tokenizer's end-of-sequence token {self._hf.eos_token!r}: make one the other"
            )


def begins_every_turn(tokenizer: Tokenizer) -> bool:
    """Whether the begin-of-sequence token begins every turn of a chat, as SmolLM2's `<|im_start|>` does."""
    hf = _load(tokenizer)
    if not hf.chat_template:
        return False
    text = hf.apply_chat_template([_QUESTION], tokenize=False, add_generation_prompt=True)
    return tokenizer.bos_id in tokenizer.encode(text)[1:]


def audit_tags(tokenizer: Tokenizer, tags: Sequence[str]) -> None:
    """Check that each of `tags` that has a token of its own is encoded as that token.

    Raises:
        DataError: one is cut into pieces, so the model would never meet its token.
    """
    vocabulary = _load(tokenizer).get_vocab()
    for tag in tags:
        ids = tokenizer.encode(tag)
        if tag in vocabulary and ids != [vocabulary[tag]]:
            raise DataError(
                f"{tag} is token {vocabulary[tag]} of the tokenizer in {tokenizer.path}, but is encoded as {ids}: set "
                "split_special_tokens to false in tokenizer_config.json, or make it a token that is not special"
            )


def _load(tokenizer: Tokenizer) -> Any:
    """The Hugging Face tokenizer itself."""
    return AutoTokenizer.from_pretrained(tokenizer.path, local_files_only=True)
