"""Prefixes by their content: what was computed once is found again by every later prompt that begins alike."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable
from collections.abc import Sequence as Items
from itertools import takewhile

import torch
from torch import Tensor

from limber_fast import checks
from limber_fast.cache.pool import PagePool, Sequence

_OP = "PrefixTree"


def contents(*parts: Items[int] | Tensor) -> list[Hashable]:
    """What `PrefixTree` knows tokens by, one entry each, of the parts of a prompt in order.

    Args:
        parts: token ids (a sequence of integers or an integer tensor [S]), by their numbers; and embeddings [S, E],
            soft prompts, by a digest of each row's bytes and dtype: one bit of difference is another token, and an id
            never equals an embedding.
    """
    found: list[Hashable] = []
    for part in parts:
        if isinstance(part, Tensor) and part.is_floating_point():
            checks.embedding_rows(_OP, part)
            kind = str(part.dtype).encode()
            rows = part.detach().cpu().contiguous().view(torch.uint8).numpy()
            found += [hashlib.blake2b(row.tobytes(), digest_size=16, key=kind).digest() for row in rows]
        else:
            found += part.tolist() if isinstance(part, Tensor) else list(part)
    return found


class _Node:
    """A page and the tokens it holds; its children hold those that follow."""

    __slots__ = ("children", "page", "parent", "tokens")

    def __init__(self, tokens: tuple[Hashable, ...], page: int, parent: _Node | None) -> None:
        self.tokens, self.page, self.parent = tokens, page, parent
        self.children: dict[tuple[Hashable, ...], _Node] = {}


class PrefixTree:
    """Keeps the pages of finished prompts for others that begin alike, for as long as nobody needs the memory.

    A tree of pages whose edges are the tokens' contents (see `contents`); it holds its pages as a sequence does. Where
    the pool runs out, pages that only the tree holds are given up, the least recently used first and a page never
    before those that follow it; pages of sequences never are.

    Safe under threads, by the pool's lock.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self._root = _Node((), -1, None)
        self._used: OrderedDict[_Node, None] = OrderedDict()  # least recently used first, children before parents
        self._counts = dict.fromkeys(("lookups", "hits", "hit_tokens", "missed_tokens", "evicted_pages"), 0)
        pool.reclaim = self._reclaim

    def find(self, tokens: Items[Hashable], *, leave: int = 1) -> Sequence:
        """A new sequence of the longest known prefix of `tokens`, at any place, also within a page.

        Args:
            tokens: by `contents`.
            leave: as many tokens at the end are not taken from the cache: the last one must be computed to go on from.
        """
        with self.pool.lock:
            most = max(0, len(tokens) - leave)
            path, length = self._walk(tokens[:most])
            self._touch(path)
            counts = self._counts
            counts["lookups"] += 1
            counts["hits"] += length > 0
            counts["hit_tokens"] += length
            counts["missed_tokens"] += len(tokens) - length
            pages = [node.page for node in path]
            self.pool._hold(pages)
            return Sequence(self.pool, pages, length)

    def insert(self, sequence: Sequence, tokens: Items[Hashable]) -> None:
        """Makes the first tokens of `sequence` known, whose keys and values have been written.

        Raises: ValueError where `tokens` are more than the sequence holds.
        """
        with self.pool.lock:
            checks.open_sequences(_OP, [sequence], [0], self.pool)
            checks.known_tokens(_OP, len(tokens), sequence.length)
            node, size, path = self._root, self.pool.page_size, []
            for index in range(-(-len(tokens) // size)):
                key = tuple(tokens[index * size : (index + 1) * size])
                child = node.children.get(key)
                if child is None:
                    child = node.children[key] = _Node(key, sequence.pages[index], node)
                    self.pool._hold([child.page])
                path.append(child)
                node = child
            self._touch(path)

    def stats(self) -> dict[str, int]:
        """Lookups and hits, tokens found and missed, pages and bytes kept, pages given up; the pool's as pool_..."""
        with self.pool.lock:
            kept = len(self._used)
            return {**self._counts, "kept_pages": kept, "kept_bytes": kept * self.pool.page_bytes,
                    **{f"pool_{name}": value for name, value in self.pool.stats().items()}}  # fmt: skip

    def spare_pages(self) -> int:
        """Pages that would be given up if they were wanted."""
        with self.pool.lock:
            return sum(self.pool._holders[node.page] == 1 for node in self._used)

    def clear(self) -> None:
        """Forgets everything; sequences keep their pages."""
        with self.pool.lock:
            self.pool._drop([node.page for node in self._used])
            self._used.clear()
            self._root.children.clear()

    def _walk(self, tokens: Items[Hashable]) -> tuple[list[_Node], int]:
        """The nodes of the longest known prefix and its length; of the last node it may be a part."""
        node, length, path, size = self._root, 0, [], self.pool.page_size
        while (child := node.children.get(tuple(tokens[length : length + size]))) is not None and length < len(tokens):
            path.append(child)
            length += len(child.tokens)
            node = child
            if len(child.tokens) < size:
                return path, length
        rest = tokens[length : length + size]
        alike = {child: _common(child.tokens, rest) for child in node.children.values()} if len(rest) else {}
        best = max(alike, key=alike.__getitem__, default=None)
        if best is not None and alike[best]:
            path.append(best)
            length += alike[best]
        return path, length

    def _touch(self, path: list[_Node]) -> None:
        for node in reversed(path):
            self._used[node] = None
            self._used.move_to_end(node)

    def _reclaim(self, count: int) -> None:
        gone = []
        for node in self._used:
            if count == len(gone):
                break
            if not node.children and self.pool._holders[node.page] == 1:
                del node.parent.children[node.tokens]
                gone.append(node)
        for node in gone:
            del self._used[node]
        self.pool._drop([node.page for node in gone])
        self._counts["evicted_pages"] += len(gone)


def _common(a: Items[Hashable], b: Items[Hashable]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
