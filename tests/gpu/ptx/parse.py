"""PTX text -> a Kernel: parameters, register widths, shared variables and a flat list of instructions.

Nested `{ }` scopes, which inline assembly opens, have labels and registers of their own: a name declared in a scope is
stored with the scope's number, so that the same text pasted twice does not collide.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from .syntax import (
    IMPLICIT_DEFINITION,
    Address,
    Immediate,
    Instruction,
    Kernel,
    Parameter,
    Register,
    Special,
    Symbol,
    TensorAddress,
    Vector,
)  # fmt: skip
from .values import UnknownInstruction, parse_type


@lru_cache(32)
def parse(ptx: str, entry: str | None = None) -> Kernel:
    """The kernel named `entry` (or containing it in its mangled name); the only one where `entry` is None."""
    text = re.sub(r"//\s*implicit-def:\s*(%\w+)", rf"{IMPLICIT_DEFINITION} \1;", ptx)
    text = re.sub(r"//[^\n]*|/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n"), text, flags=re.S)
    header = _find_entry(text, entry)
    body = text[header.end() : _closing_brace(text, header.end())]
    newlines = [at.start() for at in re.finditer("\n", text)]
    parser = _BodyParser(header[1], header.end(), newlines)
    for name in re.findall(r"\.extern\s+\.shared[^;]*?([\w$]+)\s*\[\s*\]", text):
        parser.dynamic_shared.append(name)
    for declaration in re.findall(r"^\s*((?:\.visible\s+)?\.shared[^;]*);", text[: header.start()], re.M):
        parser.variable(re.sub(r"^\.visible\s+", "", declaration))
    return parser.finish(body, _parameters(header[2]))


def _find_entry(text: str, entry: str | None) -> re.Match[str]:
    entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)[^{]*\{", text))
    names = [e[1] for e in entries]
    chosen = [e for e in entries if entry is None or entry == e[1]] or [e for e in entries if entry and entry in e[1]]
    if len(chosen) != 1:
        raise ValueError(f"execute: entry={entry!r} must name one kernel; the module has {names}")
    return chosen[0]


def _closing_brace(text: str, start: int) -> int:
    depth = 1
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return start + brace.start()
    raise ValueError("execute: the kernel's closing brace is missing")


def _parameters(text: str) -> list[Parameter]:
    found, offset = [], 0
    for declaration in filter(None, (p.strip() for p in text.split(","))):
        match = re.search(r"\.([busf])(\d+)\s.*?([\w$]+)\s*(?:\[(\d+)\])?$", declaration, re.S)
        if not match:
            raise UnknownInstruction(f"parameter: {declaration}")
        element = int(match[2]) // 8
        size = element * int(match[4] or 1)
        align = re.search(r"\.align\s+(\d+)", declaration)
        step = max(element, int(align[1]) if align and match[4] else 1)
        offset = -(-offset // step) * step
        found.append(Parameter(match[3], offset, size))
        offset += size
    return found


def split_operands(text: str) -> list[str]:
    """Split at commas outside brackets."""
    pieces, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "[{(":
            depth += 1
        elif c in "]})":
            depth -= 1
        elif c == "," and depth == 0:
            pieces.append(text[start:i].strip())
            start = i + 1
    pieces.append(text[start:].strip())
    return [p for p in pieces if p]


class _BodyParser:
    def __init__(self, name: str, start: int, newlines: list[int]) -> None:
        self.name, self.start, self.newlines = name, start, newlines
        self.registers: dict[str, int] = {}
        self.shared: dict[str, int] = {}
        self.shared_bytes = 0
        self.local: dict[str, int] = {}
        self.local_bytes = 0
        self.dynamic_shared: list[str] = []
        self.labels: dict[str, int] = {}
        self.instructions: list[Instruction] = []
        self.branches: list[tuple[Instruction, list[int], str]] = []
        self.scopes = [0]
        self.scope_count = 0

    def finish(self, body: str, parameters: list[Parameter]) -> Kernel:
        for statement, line in self._statements(body):
            self._statement(statement, line)
        for instruction, scopes, label in self.branches:
            names = (f"{label}@{s}" for s in reversed(scopes))
            instruction.target = next((self.labels[n] for n in names if n in self.labels), -1)
            if instruction.target < 0:
                raise ValueError(f"execute: no label {label!r} for: {instruction.text}")
        start = -(-self.shared_bytes // 16) * 16 if self.dynamic_shared else self.shared_bytes
        self.shared.update(dict.fromkeys(self.dynamic_shared, start))
        return Kernel(
            self.name, parameters, self.registers, self.shared, start, self.local, self.local_bytes, self.instructions
        )

    def _statements(self, body: str) -> Iterator[tuple[str, int]]:
        """Statements without their semicolons, and their lines. Labels, braces and directives are acted on here."""
        line_directive = re.compile(r"\.(loc|file|section|maxntid|reqntid|minnctapersm|maxnreg)\b[^\n]*")
        label = re.compile(r"([\w$]+)\s*:(?!:)")
        end = self.start - 1
        for chunk in body.split(";"):
            end += len(chunk) + 1
            rest = chunk.lstrip()
            while rest:
                if rest[0] == "{":
                    self.scope_count += 1
                    self.scopes.append(self.scope_count)
                    rest = rest[1:].lstrip()
                elif rest[0] == "}":
                    self.scopes.pop()
                    rest = rest[1:].lstrip()
                elif found := line_directive.match(rest):
                    rest = rest[found.end() :].lstrip()
                elif found := label.match(rest):
                    self.labels[f"{found[1]}@{self.scopes[-1]}"] = len(self.instructions)
                    rest = rest[found.end() :].lstrip()
                else:
                    yield " ".join(rest.split()), bisect_right(self.newlines, end - len(rest))
                    break

    def _statement(self, text: str, line: int) -> None:
        if text.startswith(".reg"):
            self._registers(text)
        elif text.startswith((".shared", ".local")):
            self.variable(text)
        elif text.startswith((".pragma", ".align")):
            return
        elif text.startswith("."):
            raise UnknownInstruction(f"directive: {text}")
        else:
            self._instruction(text, line)

    def _registers(self, text: str) -> None:
        kind, names = re.match(r"\.reg\s*\.(\w+)\s+(.*)", text).groups()
        bits = parse_type(kind).bits
        for name in split_operands(names):
            family = re.fullmatch(r"(%?[\w$]+)<(\d+)>", name)
            if family:
                self.registers.update((f"{family[1]}{i}", bits) for i in range(int(family[2])))
            else:
                self.registers[name if self.scopes[-1] == 0 else f"{name}@{self.scopes[-1]}"] = bits

    def variable(self, text: str) -> None:
        """A `.shared` or `.local` array, laid out in order of declaration."""
        found = re.match(r"\.(shared|local)\s*(?:\.align\s+(\d+))?\s*\.([busf])(\d+)\s+([\w$]+)\s*(?:\[(\d+)\])?", text)
        if not found:
            raise UnknownInstruction(f"variable: {text}")
        element = int(found[4]) // 8
        align, size = int(found[2] or element), element * int(found[6] or 1)
        if found[1] == "shared":
            self.shared[found[5]] = -(-self.shared_bytes // align) * align
            self.shared_bytes = self.shared[found[5]] + size
        else:
            self.local[found[5]] = -(-self.local_bytes // align) * align
            self.local_bytes = self.local[found[5]] + size

    def _instruction(self, text: str, line: int) -> None:
        rest, guard, negated = text, None, False
        if rest[0] == "@":
            predicate, rest = rest[1:].split(None, 1)
            negated = predicate[0] == "!"
            guard = self._scoped(predicate.lstrip("!"))
        opcode = re.match(r"[\w.:]+", rest)[0]
        operands = [self._operand(o) for o in split_operands(rest[len(opcode) :])]
        instruction = Instruction(text, tuple(opcode.split(".")), operands, line, guard, negated)
        if instruction.opcode == "bra":
            self.branches.append((instruction, list(self.scopes), operands[0].name.split("@")[0]))
        self.instructions.append(instruction)

    def _scoped(self, name: str) -> str:
        for scope in reversed(self.scopes[1:]):
            if f"{name}@{scope}" in self.registers:
                return f"{name}@{scope}"
        return name

    def _operand(self, text: str) -> Any:
        if text[0] == "{":
            return Vector(tuple(self._operand(t) for t in split_operands(text[1:-1])))
        if text[0] == "[":
            inside = split_operands(text[1:-1])
            if len(inside) == 2:
                return TensorAddress(self._operand(inside[0]), self._operand(inside[1]).items)
            base, _, offset = inside[0].partition("+")
            return Address(self._operand(base.strip()), int(offset.strip() or "0", 0))
        if "|" in text:
            return Vector(tuple(self._operand(t) for t in text.split("|")))
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text):
            return Immediate(int(text[2:], 16))
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return Immediate(int(text.rstrip("U"), 0))
        if text == "_" or self._scoped(text.lstrip("!")) in self.registers:
            bare = text.lstrip("!")
            return Register(("!" if text[0] == "!" else "") + self._scoped(bare))
        return Special(text[1:]) if text[0] == "%" else Symbol(text)
