"""The program's side of a check: executes a program nobody trusts, then answers calls on what it defines.

It runs inside the program's box, with the standard library only. Nothing here is a defence: the program may replace
all of it. What it can reach by that is to choose its own answers, which it may choose anyway.
"""

import itertools
import operator
import os
import sys
import types
from collections.abc import Callable
from typing import Any

from megatron_r1.reward.sandbox.inside import process
from megatron_r1.reward.sandbox.inside.blame import blame, message
from megatron_r1.reward.sandbox.inside.channel import Channel
from megatron_r1.reward.sandbox.inside.programs import prepare_python
from megatron_r1.reward.sandbox.inside.values import decode, encode

_OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, arguments, keywords: function(*arguments, **keywords),
    "attribute": getattr,
    "set_attribute": setattr,
    "item": operator.getitem,
    "set_item": operator.setitem,
    "delete_item": operator.delitem,
    "length": len,
    "truth": bool,
    "text": str,
    "description": repr,
    "iterate": iter,
    "next": lambda iterator: tuple(itertools.islice(iterator, 1)),
}


def answer(channel: Channel, prelude: str, source: str, limits: dict[str, Any]) -> dict[str, Any]:
    """Execute the program in the box's own process and answer every line; it ends when the other end closes.

    The first reply is `{"status": "ok"}`, or "failed" with what the program raised.
    """
    os.dup2(1, 2)  # to nowhere: nobody reads it while questions are answered
    process.limit(limits)
    main = types.ModuleType("solution")  # not __main__: what a script does when it is run is not wanted
    prepare_python(main, "main.py")
    sys.modules["solution"] = main
    try:
        for name, text in (("prelude.py", prelude), ("main.py", source)):
            exec(compile(text, name, "exec", dont_inherit=True), main.__dict__)  # noqa: S102 - what a box is for
    except BaseException as error:  # sys.exit() included
        return {"status": "failed", "stderr": blame(error, "main.py")}
    answers = Answers(main.__dict__)
    channel.send({"status": "ok"})
    for command in channel:
        channel.send(answers.answer(command))
    sys.exit()


class Answers:
    """The program's namespace, and the objects that the check holds handles of."""

    def __init__(self, namespace: dict[str, Any]) -> None:
        self._namespace = namespace
        self._objects: list[Any] = []

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """`{"value": ...}`, or `{"error": [class names], "message": ...}`."""
        try:
            return {"value": encode(self._perform(**question), self._handle)}
        except BaseException as error:  # sys.exit() is an answer like any other
            names = [kind.__name__ for kind in type(error).__mro__]
            return {"error": names, "message": message(error)}

    def _perform(self, operation: str, arguments: list[Any]) -> Any:
        if operation == "names":  # the values of global names, as far as they exist
            return {name: self._namespace[name] for name in arguments if name in self._namespace}
        return _OPERATIONS[operation](*(decode(argument, self._objects.__getitem__) for argument in arguments))

    def _handle(self, value: Any) -> int:
        self._objects.append(value)
        return len(self._objects) - 1
