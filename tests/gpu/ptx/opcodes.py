"""The table from opcode to handler. A handler reads its operands from the machine and writes its results there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .values import UnknownInstruction

if TYPE_CHECKING:
    from .machine import Machine
    from .syntax import Instruction

Handler = Callable[["Machine", "Instruction"], Any]
HANDLERS: dict[str, Handler] = {}


def opcode(*names: str) -> Callable[[Handler], Handler]:
    """Register a handler for opcodes such as `add` or `cp.async.bulk`; the longest match wins."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def find_handler(instruction: Instruction) -> Handler:
    for length in range(min(5, len(instruction.parts)), 0, -1):
        handler = HANDLERS.get(".".join(instruction.parts[:length]))
        if handler:
            return handler
    raise UnknownInstruction(f"unknown instruction: {instruction.text}")


def refuse(instruction: Instruction, *modifiers: str) -> None:
    """Raise where the instruction carries a modifier whose effect is not modelled."""
    found = instruction.modifiers.intersection(modifiers)
    if found:
        raise UnknownInstruction(f"modifier .{', .'.join(sorted(found))} is not modelled: {instruction.text}")
