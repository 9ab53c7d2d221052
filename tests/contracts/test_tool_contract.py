"""What every tool keeps to; `--component` runs this on yours."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron_r1.registry import BUILT_IN
from megatron_r1.rollout.tools.base import Tool
from megatron_r1.types import Question
from tests.contracts.built_in import TOOLS
from tests.contracts.conftest import refuses_unknown_keys

QUESTION = Question("sums-0", "sums", "User: 6 * 7? Assistant:", "42")
CALLS = ("print(6 * 7)", "", "(", "\n print(1)\n", "print('</think>\N{SNOWMAN}')")


def test_every_built_in_is_held_to_the_contract() -> None:
    assert {part["type"] for part in TOOLS} == set(BUILT_IN["tool"])


def test_unknown_keys_are_refused(tool_section: dict[str, Any]) -> None:
    assert refuses_unknown_keys("tool", tool_section)


def test_a_call_is_found_where_it_ends_a_turn_and_nowhere_else(tool: Tool) -> None:
    begin, end = tool.config.begin, tool.config.end
    if not (begin and end):
        assert tool.find("so", False, QUESTION) is None, "a message is not over"
        return
    assert tool.find(f"so {begin}\nx = 1\n{end}\n", False, QUESTION) == "\nx = 1\n"
    assert tool.find(f"{begin}a{end} so {begin}b{end}", False, QUESTION) == "b"
    for text in ("", "so", begin, f"so {begin} a", f"{begin}a{end} so", end):
        assert tool.find(text, False, QUESTION) is None, text


def test_outputs_are_texts_and_repeat_in_any_thread(tool: Tool) -> None:
    tool.prepare()
    try:
        alone = [tool.run(call, QUESTION) for call in CALLS]
        with ThreadPoolExecutor(4) as threads:
            together = list(threads.map(lambda call: tool.run(call, QUESTION), CALLS))
    finally:
        tool.close()
        tool.close()
    assert all(isinstance(output, str) for output in alone)
    assert alone == together
    assert tool.config.result.count("{output}") >= 1
