"""A pickle's content without running it: a machine for pickle's opcodes in which every name is only a name.

Nothing is imported, looked up or called. Numbers, texts and containers are what they are; `OrderedDict` and
`torch.Size` become dicts and tuples; tensors become records of what they claim (`StoredTensor`), which `pickles.py`
reads where they are wanted; everything else, whatever a file names, is a `Stub` that does nothing.
"""

from __future__ import annotations

import operator
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from doconv_convert.artifacts.checkpoints.records import (
    ITEM_BYTES,
    STORAGE_DTYPES,
    Name,
    Storage,
    Stub,
    Unreadable,
    made,
    made_set,
    pairs,
)

# A tensor takes 30 operations, an operation at most 100 bytes of memory.
MOST_OPERATIONS = 4_000_000
# Memo indices have four bytes; as texts they may be any number.
_LARGEST_INDEX = 2**32


@dataclass
class Machine:
    """One file's pickles: `names` are all that they refer to, `storages` what they claim the file to hold."""

    names: dict[str, None] = field(default_factory=dict)
    storages: dict[str, Storage] = field(default_factory=dict)
    operations: int = 0

    def load(self, file: BinaryIO) -> Any:
        """What the pickle at the file's position holds; the position is behind it afterwards.

        Raises Unreadable, ValueError, and what damaged opcodes make of Python's lists.
        """
        run = _Run(self)
        for opcode, argument, _ in pickletools.genops(file):
            self.operations += 1
            if self.operations > MOST_OPERATIONS:
                raise Unreadable(f"it has more than {MOST_OPERATIONS:,} operations")
            if opcode.name == "STOP":
                return run.stack.pop()
            step = _STEPS.get(opcode.name)
            if step is None:
                run.stack.append(argument)  # the opcodes that push what they hold
            else:
                step(run, argument)
        raise Unreadable("it has no end")

    def named(self, module: Any, name: Any) -> Name:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise Unreadable("a name that is no text")
        found = Name("builtins" if module == "__builtin__" else module, name)  # as protocol 2 writes it
        self.names[str(found)] = None
        return found

    def storage(self, pid: Any) -> Any:
        """The storage that a persistent id means."""
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"):
            return Stub("a persistent id")
        kind, key, count, view = pid[1], pid[2], pid[4], pid[5] if len(pid) > 5 else None
        dtype = STORAGE_DTYPES.get(kind.name) if isinstance(kind, Name) and kind.module.startswith("torch") else None
        if dtype is None:
            return Stub(str(kind) if isinstance(kind, Name) else "a storage")
        count = operator.index(count)
        if not isinstance(key, str) or count < 0:
            raise Unreadable("a storage without a key or a size")
        known = self.storages.get(key)
        if known is None or count * ITEM_BYTES[dtype] > known.size:
            self.storages[key] = Storage(key, dtype, count)
        if view is None:
            return Storage(key, dtype, count)
        start, part = operator.index(view[1]), operator.index(view[2])  # of it, in files before torch 1.6
        if min(start, part) < 0 or start + part > count:
            raise Unreadable("a view that reaches behind the end of its storage")
        return Storage(key, dtype, part, start)


@dataclass
class _Run:
    """The stack, the stacks under its marks and the memo of one pickle."""

    machine: Machine
    stack: list[Any] = field(default_factory=list)
    below: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def drop(self) -> None:
        self.to_mark()

    def gather(self, make: Callable[[list[Any]], Any]) -> None:
        items = self.to_mark()
        self.stack.append(make(items))

    def put(self, index: Any) -> None:
        if not 0 <= operator.index(index) < _LARGEST_INDEX:
            raise Unreadable("a memo index out of range")
        self.memo[index] = self.stack[-1]

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.drop()

    def append(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], dict):
            self.stack[-1].update(pairs(items))

    def call(self, function: Any, arguments: Any) -> None:
        self.stack.append(made(function, arguments))

    def build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Stub):
            self.stack[-1].state = state


def _refuse(run: _Run, argument: Any) -> None:
    raise Unreadable("an opcode that torch.save never writes")


def _tuple_of(count: int) -> Callable[[_Run, Any], None]:
    def step(run: _Run, _: Any) -> None:
        items = [run.stack.pop() for _ in range(count)]
        run.stack.append(tuple(reversed(items)))

    return step


def _named(run: _Run, text: str) -> Name:
    """The two lines of GLOBAL and INST, which pickletools joins by a space."""
    return run.machine.named(*text.split(" ", 1)) if " " in text else run.machine.named(text, "")


def _new(run: _Run, parts: int) -> None:
    """REDUCE, NEWOBJ (function, arguments) and NEWOBJ_EX (and keywords)."""
    function, arguments, *_ = [run.stack.pop() for _ in range(parts)][::-1]
    run.call(function, arguments)


def _inst(run: _Run, text: Any) -> None:
    arguments = tuple(run.to_mark())
    run.call(_named(run, text), arguments)


def _obj(run: _Run, _: Any) -> None:
    function, *arguments = run.to_mark()
    run.call(function, tuple(arguments))


def _stack_name(run: _Run, _: Any) -> None:
    name, module = run.stack.pop(), run.stack.pop()
    run.stack.append(run.machine.named(module, name))


def _append_one(run: _Run, _: Any) -> None:
    item = run.stack.pop()
    run.append([item])


def _set_one(run: _Run, _: Any) -> None:
    value, key = run.stack.pop(), run.stack.pop()
    run.set_items([key, value])


def _add_items(run: _Run, _: Any) -> None:
    items = run.to_mark()
    if isinstance(run.stack[-1], Stub) and isinstance(run.stack[-1].state, list):
        run.stack[-1].state.extend(items)


_STEPS: dict[str, Callable[[_Run, Any], None]] = {
    "MARK": lambda run, _: run.mark(),
    "POP": lambda run, _: run.pop(),
    "POP_MARK": lambda run, _: run.drop(),
    "DUP": lambda run, _: run.stack.append(run.stack[-1]),
    "NONE": lambda run, _: run.stack.append(None),
    "NEWTRUE": lambda run, _: run.stack.append(True),
    "NEWFALSE": lambda run, _: run.stack.append(False),
    "EMPTY_LIST": lambda run, _: run.stack.append([]),
    "EMPTY_TUPLE": lambda run, _: run.stack.append(()),
    "EMPTY_DICT": lambda run, _: run.stack.append({}),
    "EMPTY_SET": lambda run, _: run.stack.append(made_set()),
    "LIST": lambda run, _: run.gather(list),
    "TUPLE": lambda run, _: run.gather(tuple),
    "DICT": lambda run, _: run.gather(pairs),
    "FROZENSET": lambda run, _: run.gather(made_set),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "APPEND": _append_one,
    "APPENDS": lambda run, _: run.append(run.to_mark()),
    "SETITEM": _set_one,
    "SETITEMS": lambda run, _: run.set_items(run.to_mark()),
    "ADDITEMS": _add_items,
    "GLOBAL": lambda run, text: run.stack.append(_named(run, text)),
    "STACK_GLOBAL": _stack_name,
    "REDUCE": lambda run, _: _new(run, 2),
    "NEWOBJ": lambda run, _: _new(run, 2),
    "NEWOBJ_EX": lambda run, _: _new(run, 3),
    "INST": _inst,
    "OBJ": _obj,
    "BUILD": lambda run, _: run.build(),
    "PERSID": lambda run, _: run.stack.append(Stub("a persistent id")),
    "BINPERSID": lambda run, _: run.stack.append(run.machine.storage(run.stack.pop())),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), lambda run, index: run.put(index)),
    "MEMOIZE": lambda run, _: run.put(len(run.memo)),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda run, index: run.stack.append(run.memo[index])),
    **dict.fromkeys(("PROTO", "FRAME"), lambda run, _: None),
    **dict.fromkeys(("EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"), _refuse),
}
