"""Rows to token ids, and what the audit finds: each fault of a row, of a template and of a tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_r1.config.sft import ChatsSection
from megatron_r1.data.chats import Chats
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError
from tests.data.chat_rows import TEMPLATE, row, source, with_template, write_tokenizer

TALK = [
    {"role": "system", "content": "Add."},
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": "<think>\n1+2=3</think> <answer>3</answer>"},
    {"role": "user", "content": "3 + 2?"},
    {"role": "assistant", "content": "<think>\n3+2=5</think> <answer>5</answer>"},
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("chats"))


@pytest.fixture(scope="session")
def plain(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="session")
def templated(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return with_template(folder, tmp_path_factory.mktemp("templated"))


def left_out(tokenizer: Tokenizer, data: ChatsSection, max_length: int = 100) -> list[str]:
    """What the audit says about the rows that are not trained on."""
    chats = Chats(tokenizer, max_length)
    list(chats.read(data))
    assert chats.audit.bad == len(chats.audit.shown)
    return chats.audit.shown


def test_a_row_is_its_prompt_and_its_response_with_the_end(plain: Tokenizer, tmp_path: Path) -> None:
    rows = [row(number) for number in range(600)]  # more than one chunk
    chats = Chats(plain, 100)
    examples = list(chats.read(source(tmp_path, *rows)))
    assert [plain.decode(example.prompt + example.response) for example in examples] == [
        text["prompt"] + text["response"] for text in rows
    ]
    for example, text in zip(examples, rows, strict=True):
        assert example.prompt == plain.encode_prompt(text["prompt"])
        assert example.response == [*plain.encode(text["response"]), plain.eos_id]
        assert example.domain == text["domain"]
    assert chats.audit.warnings() == []
    assert chats.audit.examples == 600


def test_columns_by_other_names_and_a_domain_by_the_files(plain: Tokenizer, tmp_path: Path) -> None:
    data = source(tmp_path, {"q": "User: 1?", "a": " <answer>1</answer>", "k": 1}, {"q": "x", "a": "y", "k": 2})
    data = data.model_copy(update={"columns": {"prompt": "q", "response": "a"}, "where": {"k": 1}})
    (example,) = Chats(plain, 100).read(data)
    assert example.prompt == plain.encode_prompt("User: 1?")
    assert example.domain == "chats"


def test_each_turn_of_the_assistant_follows_the_prompt_of_its_inference(templated: Tokenizer, tmp_path: Path) -> None:
    hf = AutoTokenizer.from_pretrained(templated.path)
    examples = list(Chats(templated, 200).read(source(tmp_path, {"messages": TALK, "domain": "math"})))
    assert len(examples) == 2
    for example, turn in zip(examples, (2, 4), strict=True):
        served = hf.apply_chat_template(TALK[:turn], add_generation_prompt=True, tokenize=True, return_dict=False)
        assert example.prompt == served
        # The template has begun the reasoning, and only the response and its end are trained on.
        expected = TALK[turn]["content"].removeprefix("<think>\n")
        assert hf.decode(example.response) == expected + hf.eos_token
        assert example.response[-1] == templated.eos_id
    later = hf.decode(examples[1].prompt)
    assert "1+2=3" not in later, "the template strips earlier reasoning, at inference as here"
    assert "<answer>3</answer>" in later


BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "no response": ({"prompt": "a"}, r"no text in 'response' \(its columns are prompt\)"),
    "null": (row(1, response=None), "no text in 'response'"),
    "blank": (row(1, response="  "), "no text in 'response' .response = '  '"),
    "number": (row(1, prompt=5), "no text in 'prompt' .prompt = 5"),
    "not closed": (row(1, response=" <think>1+2=3 <answer>3</answer>"), "do not match"),
    "not opened": (row(1, response=" 1+2=3</think>"), "do not match"),
    "opened twice": (row(1, prompt="User: 1? Assistant: <think>\n", response="<think>3</think>"), "do not match"),
    "wrong order": (row(1, response="</think>3<think>"), "do not match"),
    "nested": (row(1, response="<think><think>3</think></think>"), "do not match"),
    "messages": ({"messages": [{"role": "user"}]}, "not a list of { role, content }"),
    "text for messages": ({"messages": "hello"}, "not a list of { role, content }"),
    "no turn": ({"messages": TALK[:2]}, "the assistant answers nothing"),
    "no question": ({"messages": TALK[2:]}, "the assistant answers nothing"),
    "empty turn": ({"messages": [*TALK[:2], {"role": "assistant", "content": ""}]}, "no text in 'response'"),
    "end inside": (row(1, response=" 3</s> 4"), "end-of-sequence token inside"),
    "end added": (row(1, response=" 3</s>"), "leave it out: it is added"),
    "begin doubled": (row(1, prompt="<s>User: 1?"), "a second begin-of-sequence token in the prompt"),
    "begin amid": (row(1, prompt="Add. <s>User: 1?"), "a second begin-of-sequence token in the prompt"),
    "begin inside": (row(1, response=" 3<s>"), "begin-of-sequence token inside the response"),
}


@pytest.mark.parametrize(("bad", "reason"), BAD_ROWS.values(), ids=list(BAD_ROWS))
def test_a_bad_row_is_found(templated: Tokenizer, tmp_path: Path, bad: dict[str, Any], reason: str) -> None:
    shown = left_out(templated, source(tmp_path, row(7), bad, row(8)))
    assert len(shown) == 1
    with pytest.raises(AssertionError, match=f"chats.jsonl, line 2: .*{reason}"):
        raise AssertionError(shown[0])


@pytest.mark.parametrize(
    "fine",
    [
        row(1, response=" 3"),
        row(1, prompt="User: 1? Assistant:<think>\n", response="1+2=3</think> 3"),
        row(1, response="<think>1</think> or <think>2</think> 3"),
    ],
)
def test_a_good_row_is_not(templated: Tokenizer, tmp_path: Path, fine: dict[str, Any]) -> None:
    assert left_out(templated, source(tmp_path, fine)) == []


def test_special_tokens_in_a_text_are_text_for_a_tokenizer_that_cuts_them(plain: Tokenizer, tmp_path: Path) -> None:
    assert left_out(plain, source(tmp_path, row(1, response=" 3</s> 4", prompt="<s>User: 1?"))) == []


def test_a_long_row_is_left_out_whole_and_counted(plain: Tokenizer, tmp_path: Path) -> None:
    short, long = row(1), row(2, response=" 1" * 200)
    length = len(plain.encode_prompt(short["prompt"])) + len(plain.encode(short["response"])) + 1
    for limit, kept in ((length, 1), (length - 1, 0)):
        chats = Chats(plain, limit)
        assert len(list(chats.read(source(tmp_path, short, long)))) == kept
        assert chats.audit.problems == {"longer than max_length": 2 - kept}
        assert chats.audit.bad == 0
    assert chats.audit.warnings() == ["2 of 2 responses left out: longer than max_length"]


def test_a_seam_that_changes_tokens_is_shown(plain: Tokenizer, tmp_path: Path) -> None:
    chats = Chats(plain, 100)
    list(chats.read(source(tmp_path, row(1), row(2, prompt="User: 1? Assistant: <thi", response="nk>3"))))
    # "nk>" closes nothing; together the two make the one token <think>.
    (warning,) = chats.audit.warnings()
    assert warning.startswith("1 of 2 prompts and responses make other tokens together than apart")
    assert "chats.jsonl, line 2: ': 1? Assistant: <thi' | 'nk>3'" in warning


def test_columns_that_are_missing_are_named_with_those_that_are_there(plain: Tokenizer, tmp_path: Path) -> None:
    data = source(tmp_path, {"question": "1?", "response": "1"})
    with pytest.raises(DataError, match=r"chats.jsonl has no column 'prompt'.*; it has question, response"):
        list(Chats(plain, 100).read(data))


def test_an_empty_file_is_refused(plain: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no rows"):
        list(Chats(plain, 100).read(source(tmp_path)))


@pytest.mark.parametrize(
    ("template", "settings", "message"),
    [
        (TEMPLATE.replace("{{ bos_token }}", ""), {}, r"drops the begin-of-sequence token: it begins with 'User: "),
        (TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}" * 2), {}, "begins with '<s>' 2 times"),
        (TEMPLATE, {"split_special_tokens": True}, "cuts the '<s>' of its chat template into"),
        (TEMPLATE.replace("{{ eos_token }}", "<end>"), {}, "ends an assistant's turn with '<end>'"),
        (TEMPLATE.replace("message.content.split", "''.split"), {}, "leaves out what the assistant says"),
        (None, {}, "has no chat template"),
    ],
)
def test_a_template_that_does_not_fit_the_tokenizer_is_refused(
    folder: Path, tmp_path: Path, template: str | None, settings: dict[str, Any], message: str
) -> None:
    tokenizer = with_template(folder, tmp_path / "tokenizer", template, **settings)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message):
        list(Chats(tokenizer, 100).read(source(tmp_path, {"messages": TALK})))


def test_a_template_without_begin_is_right_where_the_tokenizer_has_none(folder: Path, tmp_path: Path) -> None:
    template = TEMPLATE.replace("{{ bos_token }}", "")
    tokenizer = with_template(folder, tmp_path / "tokenizer", template, bos_token=None)
    assert tokenizer.bos_id is None
    assert len(list(Chats(tokenizer, 100).read(source(tmp_path, {"messages": TALK})))) == 2


def test_a_begin_that_begins_every_turn_may_stand_amid_a_prompt_but_not_twice_at_its_start(
    folder: Path, tmp_path: Path
) -> None:
    """SmolLM2's template: the begin-of-sequence token opens every turn."""
    chatml = (
        "{% for message in messages %}{{ bos_token + message.role + ' ' + message.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ bos_token }}assistant {% endif %}"
    )
    tokenizer = with_template(folder, tmp_path / "tokenizer", chatml)
    assert left_out(tokenizer, source(tmp_path, {"messages": TALK})) == []
    assert left_out(tokenizer, source(tmp_path, row(1, prompt="user 1 + 2?</s><s>assistant "))) == []
    (shown,) = left_out(tokenizer, source(tmp_path, row(1, prompt="<s>user 1 + 2?</s><s>assistant ")))
    assert "a second begin-of-sequence token in the prompt" in shown


def test_a_think_tag_that_its_tokenizer_cuts_is_refused(folder: Path, tmp_path: Path) -> None:
    with_template(folder, tmp_path / "tokenizer", split_special_tokens=True)
    file = tmp_path / "tokenizer/tokenizer.json"
    content = json.loads(file.read_text())
    for token in content["added_tokens"]:
        token["special"] |= token["content"] == "<think>"
    file.write_text(json.dumps(content))
    tokenizer = Tokenizer.load(file.parent)
    assert len(tokenizer.encode("<think>")) > 1
    with pytest.raises(DataError, match=r"<think> is token \d+ of the tokenizer .* but is encoded as \["):
        Chats(tokenizer, 100)
