"""The trusted side of a check: executes its source, and asks the program's box for what that source does not define.

It runs inside a box of its own, with the standard library only, and never executes anything of the program's. An
answer is read as a plain value, as a `Proxy` for any other object, or as a built-in exception; whatever else arrives
is an error of the program's.
"""

import ast
import builtins
import contextlib
import importlib
import os
import symtable
import sys
from collections.abc import Callable
from typing import Any

from megatron_r1.reward.sandbox.inside import process
from megatron_r1.reward.sandbox.inside.blame import blame
from megatron_r1.reward.sandbox.inside.channel import Channel
from megatron_r1.reward.sandbox.inside.values import NotPlainError, decode, encode

Ask = Callable[[dict[str, Any]], dict[str, Any]]
"""Sends a question to the program and returns what it answers, which is some JSON object."""

# An iteration's end would stop loops of the check quietly, as if they had run through.
_EXCEPTIONS = {
    name: kind
    for name, kind in vars(builtins).items()
    if isinstance(kind, type)
    and issubclass(kind, Exception)
    and not issubclass(kind, StopIteration | StopAsyncIteration)
}


class Remote:
    """The program, as the check reaches it."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    def names(self, names: list[str]) -> dict[str, Any]:
        """The values of global names, without those that the program does not define."""
        found = self._question("names", names)
        if not isinstance(found, dict):
            raise NotPlainError("names were asked for")
        return {name: found[name] for name in names if name in found}

    def perform(self, operation: str, *arguments: Any) -> Any:
        """One operation on the program's objects; `Proxy`s stand for these.

        Raises:
            Exception: what the operation raised, as the nearest built-in class, otherwise RuntimeError.
            TypeError: an argument is neither plain nor a `Proxy`.
        """
        return self._question(operation, [encode(argument, _number) for argument in arguments])

    def _question(self, operation: str, arguments: list[Any]) -> Any:
        answer = self._ask({"operation": operation, "arguments": arguments})
        if "error" in answer:
            raise _exception(answer)
        return decode(answer.get("value"), lambda number: Proxy(self, number))


class Proxy:
    """An object of the program's that is not plain.

    It can be called, indexed and iterated, and has attributes; each gives a plain value or another proxy. Operators
    that would let the program judge its own answers (comparison, arithmetic, `__contains__`) are not passed on.
    """

    __slots__ = ("_number", "_remote")

    def __init__(self, remote: Remote, number: int) -> None:
        object.__setattr__(self, "_remote", remote)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._remote.perform("call", self, arguments, keywords)

    def __getattr__(self, name: str) -> Any:
        return self._remote.perform("attribute", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._remote.perform("set_attribute", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._remote.perform("item", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._remote.perform("set_item", self, key, value)

    def __delitem__(self, key: Any) -> None:
        self._remote.perform("delete_item", self, key)

    def __len__(self) -> int:
        return self._remote.perform("length", self)

    def __bool__(self) -> bool:
        return self._remote.perform("truth", self)

    def __str__(self) -> str:
        return self._remote.perform("text", self)

    def __repr__(self) -> str:
        return self._remote.perform("description", self)

    def __iter__(self) -> Any:
        return self._remote.perform("iterate", self)

    def __next__(self) -> Any:
        found = self._remote.perform("next", self)
        if found == ():
            raise StopIteration
        (item,) = found
        return item

    def __eq__(self, other: object) -> bool:
        if other is None or other is self:
            return other is self
        raise TypeError("an object of the program's class is compared: only plain values can be")

    __hash__ = object.__hash__


def judge(channel: Channel, prelude: str, limits: dict[str, Any]) -> dict[str, Any]:
    """Fork a process for the checks of one program: `{"source": ...}` each, then `{}`.

    Questions go out as `{"ask": ...}`, and each gets an `{"answer": ...}`; a check ends with its `{"status": ...}`. The
    reply at the end says that the process has ended, after the last check or before it.
    """
    pid = os.fork()
    if pid == 0:
        os.dup2(1, 2)  # to nowhere: nobody reads it while there are questions
        process.limit(limits)
        while command := channel.receive():
            channel.send(_outcome(channel, prelude, command["source"]))
        os._exit(0)
    os.waitpid(pid, 0)
    return {"ended": True}


def _outcome(channel: Channel, prelude: str, source: str) -> dict[str, Any]:
    def ask(question: dict[str, Any]) -> dict[str, Any]:
        channel.send({"ask": question})
        command = channel.receive()
        if command is None:
            os._exit(1)
        return command["answer"]

    try:
        perform(prelude, source, ask)
    except BaseException as error:  # sys.exit(0) included: a check that leaves has not run through
        return {"status": "failed", "stderr": blame(error, "check.py")}
    return {"status": "ok", "stderr": ""}


def perform(prelude: str, source: str, ask: Ask) -> None:
    """Execute a check; raises what it raises, an AssertionError where the program is wrong."""
    namespace: dict[str, Any] = {"__name__": "check"}
    exec(compile(prelude, "prelude.py", "exec", dont_inherit=True), namespace)  # noqa: S102 - trusted source
    missing = sorted(free_names(source) - set(namespace) - set(vars(builtins)))
    modules = standard_modules(source, missing)
    namespace.update(Remote(ask).names([name for name in missing if name not in modules]), **modules)
    exec(compile(source, "check.py", "exec", dont_inherit=True), namespace)  # noqa: S102


def free_names(source: str) -> set[str]:
    """The global names that `source` reads and nowhere assigns at its top level."""
    top = symtable.symtable(source, "check.py", "exec")
    tables, read, assigned = [top], set(), set()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            own = table is top
            if symbol.is_referenced() and (own or symbol.is_global()):
                read.add(symbol.get_name())
            if (symbol.is_assigned() or symbol.is_imported()) and (own or symbol.is_declared_global()):
                assigned.add(symbol.get_name())
    return read - assigned


def standard_modules(source: str, names: list[str]) -> dict[str, Any]:
    """Those of `names` that `source` uses as modules of the standard library, without importing them.

    Such sources were written to be executed after the program, whose imports they count on (MBPP's `math.isclose`).
    Taken from the program, it would be the program's to say what is close.
    """
    nodes = list(ast.walk(ast.parse(source)))
    found = {}
    for name in sys.stdlib_module_names.intersection(names):
        uses = sum(isinstance(node, ast.Name) and node.id == name for node in nodes)
        attributes = [
            node.attr
            for node in nodes
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == name
        ]
        with contextlib.suppress(ImportError):  # of another system
            module = importlib.import_module(name)
            if len(attributes) == uses and all(hasattr(module, attribute) for attribute in attributes):
                found[name] = module
    return found


def _number(value: Any) -> int:
    if not isinstance(value, Proxy):
        raise TypeError(f"a {type(value).__name__} cannot be passed to the program: only plain values can be")
    return value._number


def _exception(answer: dict[str, Any]) -> Exception:
    """The built-in exception that an answer names; all its claims are doubted."""
    names, message = answer.get("error"), str(answer.get("message"))[:1000]
    known = [name for name in names if isinstance(name, str) and name in _EXCEPTIONS] if isinstance(names, list) else []
    try:
        return _EXCEPTIONS[known[0]](message)
    except (IndexError, TypeError):  # none is known, or its constructor wants more than a message
        return RuntimeError(message)
