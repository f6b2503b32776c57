"""What a parsed kernel consists of: operands, instructions, parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .values import Type, UnknownInstruction, parse_type

IMPLICIT_DEFINITION = "implicit_def"


@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Immediate:
    bits: int


@dataclass(frozen=True)
class Special:
    """A read-only register such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """A parameter, a shared variable or a label."""

    name: str


@dataclass(frozen=True)
class Vector:
    items: tuple[Any, ...]


@dataclass(frozen=True)
class Address:
    base: Any
    offset: int


@dataclass(frozen=True)
class TensorAddress:
    """`[descriptor, {coordinates}]`, innermost coordinate first."""

    descriptor: Any
    coordinates: tuple[Any, ...]


@dataclass
class Instruction:
    text: str
    parts: tuple[str, ...]
    operands: list[Any]
    line: int
    """Counted from 0 in the module's text."""
    guard: str | None = None
    guard_negated: bool = False
    target: int = -1
    """Of a branch: the index of the instruction it goes to."""
    handler: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        self.opcode = self.parts[0]
        self.modifiers = frozenset(self.parts[1:])
        types = [t for t in map(parse_type, self.parts[1:]) if t]
        self.types: tuple[Type, ...] = tuple(types)

    @property
    def type(self) -> Type:
        """The last type named, which is the operands' type in all but the conversions."""
        if not self.types:
            raise UnknownInstruction(f"no type in: {self.text}")
        return self.types[-1]


@dataclass
class Parameter:
    name: str
    offset: int
    size: int


@dataclass
class Kernel:
    name: str
    parameters: list[Parameter]
    register_bits: dict[str, int]
    shared: dict[str, int]
    static_shared: int
    local: dict[str, int]
    local_bytes: int
    instructions: list[Instruction]
