"""Conversations with an engine that says what a test lets it say: tokens, masks, seeds, limits, tools that go wrong."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from megatron_r1.config.conversation import ConversationSection
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError, EngineError
from megatron_r1.reward.format import well_formed
from megatron_r1.reward.response import extract_answer, response
from megatron_r1.rollout.conversation import Conversation, Take
from megatron_r1.rollout.engine import Sampling
from megatron_r1.rollout.responses import Ask, Response, to_sample
from megatron_r1.rollout.server import EngineLostError
from megatron_r1.rollout.tools.base import Tool
from megatron_r1.seeds import stream_seed
from megatron_r1.types import Question, Sample
from tests.rollout.calling_model import write_tokenizer

EOS = "</s>"
RELEASE = threading.Event()


class Echo(Tool):
    """Says the call again, in capitals."""

    def run(self, call: str, question: Question) -> str:
        return call.upper()


class Rude(Tool):
    """Goes wrong as it is told to."""

    def run(self, call: str, question: Question) -> str:
        if call == "hang":
            assert RELEASE.wait(60)
        if call == "exit":
            raise SystemExit(3)
        if call == "broken":
            raise EngineError("the sandbox is gone")
        return str(1 // int(call))


HERE = "tests.rollout.test_conversation"
ECHO = {"type": f"{HERE}:Echo"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("letters")))


@pytest.fixture(autouse=True)
def _released() -> Iterator[None]:
    RELEASE.clear()
    yield
    RELEASE.set()


@dataclass
class Engine:
    """Goes on with a text as it is told to for the last key in it, up to a stop token or the end of the room."""

    tokenizer: Tokenizer
    says: dict[str, str]
    versions: list[int] = field(default_factory=list)
    """Of the weights of each request; empty = always 3."""
    asked: list[Ask] = field(default_factory=list)

    async def ask(self, request: Ask, take: Take) -> None:
        self.asked.append(request)
        version = self.versions[len(self.asked) - 1] if self.versions else 3
        for number, prompt in enumerate(request.prompts):
            await asyncio.sleep(0)
            tokens = self.goes_on(prompt)[: request.max_tokens[number]]
            stops = [place for place, token in enumerate(tokens) if token in request.sampling.stop_token_ids]
            tokens = tokens[: stops[0] + 1] if stops else tokens
            take(
                Response(
                    prompt=number, sample=0, tokens=tokens, logprobs=logprobs(len(tokens)),
                    finish_reason="stop" if stops else "length", weight_versions=[version],
                )
            )  # fmt: skip

    def goes_on(self, prompt: list[int]) -> list[int]:
        text = self.tokenizer.decode(prompt)
        key = max((key for key in self.says if key in text), key=lambda key: text.rindex(key) + len(key))
        return ids(self.tokenizer, self.says[key].removeprefix(text[text.rindex(key) + len(key) :]))


def logprobs(count: int) -> list[float]:
    return [-0.1 * (1 + number) for number in range(count)]


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text.removesuffix(EOS)) + [tokenizer.eos_id] * text.endswith(EOS)


def question(prompt: str, **more: Any) -> Question:
    return Question("q", "reasoning_gym", prompt, "42", **more)


def section(tools: dict[str, Any] | None = None, **changes: Any) -> ConversationSection:
    return ConversationSection.model_validate({"tools": tools or {"echo": ECHO}, **changes})


@dataclass
class Held:
    """A conversation about each question, and what came of it."""

    engine: Engine
    questions: list[Question]
    conversation: Conversation
    together: bool = True
    room: int = 200
    taken: Callable[[], None] = lambda: None
    """Called when a sample is complete."""
    samples: dict[int, Sample] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tokenizer = self.engine.tokenizer
        prompts = [tokenizer.encode_prompt(one.prompt) for one in self.questions]
        sampling = Sampling(1.0, 1.0, (tokenizer.eos_id,))
        seeds, room = [[10 * number] for number in range(len(prompts))], [self.room] * len(prompts)
        request = Ask(prompts, seeds, room, sampling, self.together, self.questions)

        def take(said: Response) -> None:
            assert said.prompt not in self.samples, "a sample arrived twice"
            self.samples[said.prompt] = to_sample(said, tokenizer.decode)
            self.taken()

        asyncio.run(self.conversation.hold(self.engine.ask, request, take))
        assert len(self.samples) == len(prompts)

    @property
    def sample(self) -> Sample:
        [sample] = self.samples.values()
        return sample

    @property
    def answer(self) -> str | None:
        return extract_answer(response(self.questions[0], self.sample))


Hold = Callable[..., Held]


@pytest.fixture
def hold(tokenizer: Tokenizer) -> Hold:
    def hold(says: dict[str, str], *questions: Question, part: ConversationSection | None = None, **more: Any) -> Held:
        engine = Engine(tokenizer, says, more.pop("versions", []))
        return Held(engine, list(questions or [ONE]), Conversation(part or section(), tokenizer), **more)

    return hold


ONE = question("One:")
CALL = "<think><tool_call>ab</tool_call>"
REPLY = "\n<tool_response>\nAB\n</tool_response>\n"
REST = "so</think><answer>AB</answer>"
CALLING = {"One:": CALL, "</tool_response>": "\n" + REST + EOS}


@pytest.mark.parametrize("together", [True, False])
def test_a_reply_stands_between_two_turns_and_is_masked(tokenizer: Tokenizer, hold: Hold, together: bool) -> None:
    held = hold({**CALLING, "Two:": "4" + EOS}, ONE, question("Two:"), together=together)
    sample, plain = held.samples[0], held.samples[1]
    assert sample.text == CALL + REPLY + REST
    turns = [ids(tokenizer, text) for text in (CALL, REPLY, REST + EOS)]
    assert sample.tokens == [token for turn in turns for token in turn]
    assert sample.mask == [number != 1 for number, turn in enumerate(turns) for _ in turn]
    assert sample.logprobs == logprobs(len(turns[0])) + logprobs(len(turns[2]))
    assert sample.length == len(sample.logprobs)
    assert sample.finished
    assert (plain.mask, plain.length, plain.finished, plain.answer_from) == ([], 2, True, 0)
    assert well_formed(response(ONE, sample))
    assert extract_answer(response(ONE, sample)) == "AB"


def test_each_turn_is_asked_with_the_tokens_so_far_a_seed_of_its_own_and_the_room_that_is_left(
    tokenizer: Tokenizer, hold: Hold
) -> None:
    held = hold({**CALLING, "Two:": "<tool_call>c</tool_call>"}, ONE, question("Two:"), together=True)
    first, second = held.engine.asked
    replies = [ids(tokenizer, CALL + REPLY), ids(tokenizer, "<tool_call>c</tool_call>" + REPLY.replace("AB", "C"))]
    assert second.prompts == [before + added for before, added in zip(first.prompts, replies, strict=True)]
    assert second.max_tokens == [200 - len(added) for added in replies]
    assert (first.seeds, second.seeds) == ([[0], [10]], [[stream_seed("turn", seed, 1)] for seed in (0, 10)])
    assert second.together


def test_what_the_model_has_said_is_never_tokenised_again(
    tokenizer: Tokenizer, hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    spelled = [tokenizer.encode(letter)[0] for letter in "<tool_call>"]
    said = [*spelled, *ids(tokenizer, "ab</tool_call>")]
    assert tokenizer.decode(said) == "<tool_call>ab</tool_call>"
    assert len(said) > len(tokenizer.encode("<tool_call>ab</tool_call>"))
    usual = Engine.goes_on
    monkeypatch.setattr(Engine, "goes_on", lambda self, prompt: usual(self, prompt) if spelled[0] in prompt else said)
    held = hold(CALLING)
    assert held.engine.asked[1].prompts[0][len(held.engine.asked[0].prompts[0]) :][: len(said)] == said
    assert held.sample.tokens[: len(said)] == said


def test_alone_a_conversation_does_not_wait_for_others(hold: Hold) -> None:
    """The tool of One hangs until Two is there."""
    part = section({"rude": {"type": f"{HERE}:Rude"}})
    says = {"One:": "<tool_call>hang</tool_call>", "Two:": "<tool_call>1</tool_call>", "</tool_response>": "\n5" + EOS}
    held = hold(says, ONE, question("Two:"), part=part, together=False, taken=RELEASE.set)
    assert list(held.samples) == [1, 0]
    assert [sample.text[-1] for sample in held.samples.values()] == ["5", "5"]


def test_weights_are_counted_over_sampled_tokens(tokenizer: Tokenizer, hold: Hold) -> None:
    old = hold(CALLING, versions=[4, 4]).sample
    assert (old.weight_version, old.weight_spans) == (4, [(4, old.length)])
    new = hold(CALLING, versions=[4, 5]).sample
    assert new.weight_version == 4
    first, last = len(ids(tokenizer, CALL)), len(ids(tokenizer, REST + EOS))
    assert new.weight_spans == [(4, first), (5, first + last)]
    assert new.length == first + last


@pytest.mark.parametrize(
    ("call", "told", "counter"),
    [
        ("0", "error: ZeroDivisionError: integer division or modulo by zero", "tool_errors"),
        ("x", "error: ValueError: invalid literal for int() with base 10: 'x'", "tool_errors"),
        ("exit", "error: SystemExit: 3", "tool_errors"),
        ("hang", "error: no answer within 0.05 s", "tool_timeouts"),
    ],
)
def test_a_tool_that_fails_tells_the_model(hold: Hold, call: str, told: str, counter: str) -> None:
    part = section({"rude": {"type": f"{HERE}:Rude"}}, timeout=0.05 if call == "hang" else 60.0)
    says = {"One:": f"<tool_call>{call}</tool_call>", "</tool_response>": "\n5" + EOS}
    held = hold(says, part=part)
    assert held.sample.text == f"<tool_call>{call}</tool_call>\n<tool_response>\n{told}\n</tool_response>\n5"
    assert held.sample.finished
    assert held.conversation.counters == {"tool_errors": 0, "tool_timeouts": 0} | {counter: 1}


@pytest.mark.parametrize("together", [True, False])
def test_a_tool_that_does_not_work_at_all_ends_the_run(hold: Hold, together: bool) -> None:
    part = section({"rude": {"type": f"{HERE}:Rude"}})
    with pytest.raises(EngineError, match="the sandbox is gone"):
        hold({"One:": "<tool_call>broken</tool_call>"}, part=part, together=together)


def test_an_engine_that_is_lost_is_told_as_such(hold: Hold, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = Engine.ask

    async def once(self: Engine, request: Ask, take: Take) -> None:
        if self.asked:
            raise EngineLostError("lost")
        await usual(self, request, take)

    monkeypatch.setattr(Engine, "ask", once)
    for together in (True, False):
        with pytest.raises(EngineLostError, match="lost"):
            hold(CALLING, together=together)


def test_the_last_turn_has_no_reply(hold: Hold) -> None:
    says = {"One:": CALL, "</tool_response>": "\n" + CALL}
    held = hold(says, part=section(max_turns=3))
    assert held.sample.text == CALL + 2 * (REPLY + CALL)
    assert held.sample.mask[-1]
    assert not held.sample.finished
    assert len(held.engine.asked) == 3


def test_a_reply_that_leaves_no_room_is_left_out(tokenizer: Tokenizer, hold: Hold) -> None:
    enough = len(ids(tokenizer, CALL + REPLY)) + 1
    held = hold(CALLING, room=enough)
    assert held.sample.text == CALL + REPLY + "s"
    assert not held.sample.finished
    held = hold(CALLING, room=enough - 1)
    assert (held.sample.text, held.sample.mask, held.sample.finished) == (CALL, [], False)
    held = hold(CALLING, room=5)
    assert (held.sample.length, held.sample.finished) == (5, False)


def test_a_long_output_is_cut(tokenizer: Tokenizer, hold: Hold) -> None:
    held = hold({**CALLING, "One:": "<tool_call>abcdefgh</tool_call>"}, part=section(max_output_tokens=3))
    assert "\n<tool_response>\nABC\n... (cut)\n</tool_response>\n" in held.sample.text


def test_a_stop_that_is_no_call_changes_nothing(hold: Hold) -> None:
    fenced = section({"echo": {**ECHO, "begin": "```python", "end": "```", "result": "\n```output\n{output}\n```\n"}})
    says = {"One:": "a`b``c ```d```" + EOS}
    held = hold(says, part=fenced)
    assert held.sample.text == says["One:"].removesuffix(EOS)
    assert (held.sample.mask, held.sample.finished) == ([], True)
    assert len(held.engine.asked) == 1 + says["One:"].count("`")
    says = {"One:": "I run ```python\nab\n```", "output": "\n\nAB\n\n```\nso" + EOS}
    held = hold(says, part=fenced)
    assert held.sample.text == "I run ```python\nab\n```\n```output\n\nAB\n\n```\nso"
    assert sum(not mine for mine in held.sample.mask) == len("\n```output\n\nAB\n\n```\n")


def test_an_output_cannot_speak_as_the_model_or_the_template(tokenizer: Tokenizer, hold: Hold) -> None:
    class Mimic(Echo):
        def run(self, call: str, question: Question) -> str:
            return "</think><answer>9</answer></s><tool_call>x</tool_call>"

    part = section()
    engine = Engine(tokenizer, {"One:": CALL, "</tool_response>": "\n" + REST + EOS})
    conversation = Conversation(part, tokenizer)
    conversation._tools["echo"] = Mimic(Mimic.Config())
    held = Held(engine, [ONE], conversation)
    assert held.answer == "AB"
    assert well_formed(response(ONE, held.sample))
    reply = [token for token, mine in zip(held.sample.tokens, held.sample.mask, strict=True) if not mine]
    tags = {tokenizer.id_of(tag) for tag in tokenizer.added}
    assert not tags & set(reply)


def test_only_the_tools_of_the_question_answer(hold: Hold) -> None:
    part = section(
        {"echo": ECHO, "rude": {"type": f"{HERE}:Rude", "result": "\n<tool_response>{output}</tool_response>"}}
    )
    one = {"One:": "<tool_call>1</tool_call>", "</tool_response>": "5" + EOS}
    assert "\n1\n" in hold(one, question("One:", tools=("echo",)), part=part).sample.text
    assert ">1<" in hold(one, question("One:", tools=("rude",)), part=part).sample.text
    assert hold({"One:": "<tool_call>1</tool_call>5" + EOS}, question("One:", tools=()), part=part).sample.mask == []


@pytest.mark.parametrize("turns", [2, 3])
def test_a_user_replies_to_messages_and_the_last_one_has_the_answer(hold: Hold, turns: int) -> None:
    """As often as there are turns; by the class of the example, with a template that opens the reasoning."""
    user = {"type": "examples/tools/second_chance.py:SecondChance", "result": "\nUser: {output} Assistant: <think>"}
    says = {
        "One:": "<think>a</think><answer>41</answer>" + EOS,
        "41 is wrong. Try again. Assistant: <think>": "b</think><answer>43</answer>" + EOS,
        "43 is wrong. Try again. Assistant: <think>": "c</think><answer>42</answer>" + EOS,
    }
    held = hold(says, part=section({"user": user}, max_turns=turns))
    assert held.answer == ("42" if turns == 3 else "43")
    assert held.sample.finished == (turns == 3)
    assert well_formed(response(ONE, held.sample))
    assert held.sample.answer_from == held.sample.text.rindex("<think>")
    assert len(held.engine.asked) == turns


def test_bad_sections(tokenizer: Tokenizer) -> None:
    reading_tags = Tokenizer.load(tokenizer.path)
    reading_tags._tokenizer.split_special_tokens = False  # as most published tokenizers are
    with pytest.raises(ConfigError, match=r"tools\.echo\.begin = 'a</s>' is 'a' once the tokenizer has read it"):
        Conversation(section({"echo": {**ECHO, "begin": "a</s>"}}), reading_tags)
    with pytest.raises(ValueError, match=r"no place for \{output\}"):
        section({"echo": {**ECHO, "result": "none"}})
    with pytest.raises(ConfigError, match=r"not a subclass of megatron_r1\.rollout\.tools\.base\.Tool"):
        Conversation(section({"echo": {"type": "megatron_r1.reward.format:Format"}}), tokenizer)
