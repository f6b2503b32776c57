"""Keys and values of frozen language models in pages, and sequences of tokens that fork without copying them."""

from limber_fast.cache.pool import CacheFull, PagePool, Sequence

__all__ = ["CacheFull", "PagePool", "Sequence"]
