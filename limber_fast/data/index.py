"""JSON files that say which image has which texts. A broken one stops everything, with its file and line."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

_SPACES = re.compile(r"[\s,:]*")
_KINDS = {str: "a string", int: "a whole number", list: "a list", dict: "an object"}


class BrokenIndex(ValueError):
    """`FILE, annotations[7], line N: what is wrong`; the entry's number as published files are one long line."""


class Index:
    """One JSON file, read whole; every complaint about it names the line.

    Args:
        kind: `dict`, or `list` for a file that is one list of objects.
    Raises: OSError where the file cannot be read; BrokenIndex where it is no JSON of that kind.
    """

    def __init__(self, path: str | Path, kind: type = dict):
        self.path = Path(path)
        try:
            self._text = self.path.read_text(encoding="utf-8-sig")
            self.content = json.loads(self._text)
        except UnicodeDecodeError as error:
            line = self.path.read_bytes()[: error.start].count(b"\n") + 1
            raise BrokenIndex(f"{self.path}, line {line}: not UTF-8: {error.reason}") from None
        except RecursionError:
            raise BrokenIndex(f"{self.path}, line 1: lists or objects within each other too often") from None
        except json.JSONDecodeError as error:
            raise BrokenIndex(f"{self.path}, line {error.lineno}: not JSON: {error.msg}") from None
        if not isinstance(self.content, kind):
            raise BrokenIndex(f"{self.path}, line 1: expected {_KINDS[kind]}; found {_kind(self.content)}")

    def entries(self, key: str | None = None) -> list[dict]:
        """The list of objects at `key`, or that the file is."""
        found = self.content if key is None else self.field(self.content, key, list)
        for row, entry in enumerate(found):
            if not isinstance(entry, dict):
                raise self.broken(f"expected an object; found {_kind(entry)}", key, row)
        return found

    def field(self, entry: dict, name: str, *kinds: type, key: str | None = None, row: int = 0) -> Any:
        """`entry[name]`, of one of `kinds`; entry is number `row` of the list at `key`, or of the file."""
        if name not in entry:
            raise self.broken(f"no {name!r}", key, row)
        value = entry[name]
        if not isinstance(value, kinds) or isinstance(value, bool):
            wanted = " or ".join(_KINDS[kind] for kind in kinds)
            raise self.broken(f"{name!r} must be {wanted}; found {_kind(value)}", key, row)
        return value

    def strings(self, entry: dict, name: str, key: str | None = None, row: int = 0) -> tuple[str, ...]:
        """`entry[name]`, a list of strings."""
        found = self.field(entry, name, list, key=key, row=row)
        for value in found:
            if not isinstance(value, str):
                raise self.broken(f"{name!r} must hold strings; found {_kind(value)}", key, row)
        return tuple(found)

    def inside(self, folder: Path, name: str, key: str | None = None, row: int = 0) -> Path:
        """`folder / name`, which must not lead out of the folder: an index may come from anywhere."""
        path = PurePosixPath(name)
        if not name or path.is_absolute() or ".." in path.parts or "\0" in name:
            raise self.broken(f"{name!r} leads out of {folder}", key, row)
        return folder / path

    def broken(self, message: str, key: str | None = None, row: int = 0) -> BrokenIndex:
        place = f"{key}[{row}], " if key is not None else f"[{row}], " if isinstance(self.content, list) else ""
        return BrokenIndex(f"{self.path}, {place}line {self._line(key, row)}: {message}")

    def _line(self, key: str | None, row: int) -> int:
        """Line on which entry `row` of the list starts: read a second time, as parsed JSON has no lines."""
        position = self._text.index("{" if isinstance(self.content, dict) else "[") + 1
        if key is not None:
            while True:
                name, position = self._next(position)
                if name == key:
                    break
                _, position = self._next(position)
            position += 1
        elif isinstance(self.content, dict):
            return self._text.count("\n", 0, position) + 1
        position = _SPACES.match(self._text, position).end()
        for _ in range(row):
            _, position = self._next(position)
        return self._text.count("\n", 0, position) + 1

    def _next(self, position: int) -> tuple[Any, int]:
        """The value at or after `position`, and where the one after it starts."""
        start = _SPACES.match(self._text, position).end()
        value, end = json.JSONDecoder().raw_decode(self._text, start)
        return value, _SPACES.match(self._text, end).end()


def _kind(value: Any) -> str:
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)
