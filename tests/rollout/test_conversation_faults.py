"""Conversations over a fleet of scripted engines that die within them: every sample arrives once, the same."""

from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.conversation import ConversationSection
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.rollout.conversation import Conversation
from megatron_r1.rollout.tools.base import Tool
from megatron_r1.seeds import stream_seed
from megatron_r1.types import Question, Sample
from tests.rollout.calling_model import write_tokenizer
from tests.rollout.scripted_server import response
from tests.rollout.test_engine_faults import PROMPTS, Open, ScriptedFleet, opened  # noqa: F401
from tests.rollout.test_flow import flowing

TURNS, N, SEED = 3, 2, 7
QUESTIONS = [Question(f"q{number}", "sums", "?", "") for number in range(len(PROMPTS))]


class Nagging(Tool):
    """Says no to every message."""

    def find(self, said: str, ended: bool, question: Question) -> str | None:
        return said if ended else None

    def run(self, call: str, question: Question) -> str:
        return "no"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("letters")))


def talking(fleet: ScriptedFleet, tokenizer: Tokenizer) -> ScriptedFleet:
    tool = {"type": f"{__name__}:Nagging", "begin": "", "end": "", "result": "{output}"}
    section = ConversationSection.model_validate({"tools": {"nagging": tool}, "max_turns": TURNS})
    fleet._running.conversation = Conversation(section, tokenizer)
    return fleet


def expected(tokenizer: Tokenizer, seed: int) -> tuple[list[int], list[bool]]:
    """Tokens and mask of a sample, whoever answers: each turn by its own seed, a reply between two."""
    tokens: list[int] = []
    mask: list[bool] = []
    for turn in range(TURNS):
        reply = tokenizer.encode("no") if turn else []
        said = response(stream_seed("turn", seed, turn) if turn else seed, 0, 50)["tokens"]
        tokens += reply + said
        mask += [False] * len(reply) + [True] * len(said)
    return tokens, mask


def same(samples: list[Sample], seeds: list[int], tokenizer: Tokenizer) -> bool:
    assert not any(sample.finished for sample in samples), "the last message has no reply"
    return [(sample.tokens, sample.mask) for sample in samples] == [expected(tokenizer, seed) for seed in seeds]


@pytest.mark.parametrize("dispatch", ["batch", "continuous"])
@pytest.mark.parametrize("fault", [None, {"kind": "die", "after": 3}, {"kind": "cut", "after": 1}], ids=str)
def test_every_turn_is_there_whatever_engines_do(
    opened: Open,  # noqa: F811
    tokenizer: Tokenizer,
    dispatch: str,
    fault: dict[str, Any] | None,
) -> None:
    fleet = talking(opened(dispatch=dispatch), tokenizer)
    if fault:
        fleet.breaks(0, **fault)
    arrived = dict(fleet.stream(PROMPTS, n=N, seed=SEED, questions=QUESTIONS))
    for number in range(len(PROMPTS)):
        seeds = [stream_seed(SEED, number, sample) for sample in range(N)]
        assert same(arrived[number], seeds, tokenizer)
    assert fleet.figures()["engines_lost"] == (fault is not None)
    assert all(member.meter.queue == 0 for member in fleet._members)
    alone = fleet.sample(PROMPTS[:1], n=1, seed=SEED)
    assert alone[0][0].tokens == response(stream_seed(SEED, 0, 0), 0, 50)["tokens"], "without questions it is one turn"


def test_a_group_in_flight_is_a_conversation(opened: Open, tokenizer: Tokenizer, tmp_path: Path) -> None:  # noqa: F811
    fleet = talking(opened(dispatch="continuous"), tokenizer)
    fleet.breaks(0, "die", after=1)
    with flowing(fleet) as told:
        for number, prompt in enumerate(PROMPTS):
            seeds = [100 * number + sample for sample in range(N)]
            told.flow.submit(f"data:{number}", prompt, seeds, 0, question=QUESTIONS[number])
        told.until(lambda: len(told.complete) == len(PROMPTS))
    for number in range(len(PROMPTS)):
        assert same(told.complete[f"data:{number}"], [100 * number + sample for sample in range(N)], tokenizer)
