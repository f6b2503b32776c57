"""Keys and values of frozen language models in pages, sequences of tokens that fork without copying them, and a tree
that finds the pages of earlier prompts by content."""

from limber_fast.cache.pool import CacheFull, PagePool, Sequence, page_size_of
from limber_fast.cache.prefix_tree import PrefixTree, contents

__all__ = ["CacheFull", "PagePool", "PrefixTree", "Sequence", "contents", "page_size_of"]
