"""A word tokenizer for short names: the vocabulary is the words of the training captions. And language models' own."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from limber_fast import checks
from limber_fast.optional import needed

_WORD = re.compile(r"[a-z0-9]+|[#*!?&+]")
PAD, UNKNOWN, FIRST_WORD = 0, 1, 2


def split_words(text: str) -> list[str]:
    """Lower-case words without accents: 'Piñata: São Tomé' -> ['pinata', 'sao', 'tome']."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode() if not text.isascii() else text
    return _WORD.findall(plain.lower().replace("'", ""))


def pretrained_tokenizer(op: str, source: str) -> Any:
    """transformers' tokenizer of a folder or a name of the hub."""
    text = "A picture of"
    try:
        found = needed("transformers", op).AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:  # both for what is not there and for what is none
        raise OSError(f"{op}: no tokenizer at {source}: {str(error).splitlines()[0]}") from error
    if not found(text, add_special_tokens=False).input_ids:  # made of nothing where a folder has no tokenizer
        remedy = "name one that does by --tokenizer, as EleutherAI/gpt-j-6b"
        raise checks.invalid(op, "tokenizer", "make tokens of text", f"none of {text!r}, from {source}", remedy)
    return found


class WordTokenizer:
    """Maps text to word ids, one id per word, closed by EOS: the highest id, where open_clip's text tower reads.

    ids: 0 padding, 1 an unknown word, 2.. the vocabulary, `vocab_size - 1` EOS. Longer texts are cut, EOS stays.

    Args:
        words: the vocabulary in id order, without duplicates.
        context_length: tokens per text, EOS included.
    Raises: ValueError for duplicate words or a context without room for one word.
    """

    def __init__(self, words: Sequence[str], context_length: int = 12):
        if len(set(words)) != len(words):
            raise ValueError("WordTokenizer: words must not repeat")
        if context_length < 2:
            raise ValueError(f"WordTokenizer: context_length must be at least 2 (a word and EOS); got {context_length}")
        self.words = list(words)
        self.context_length = context_length
        self.eos = FIRST_WORD + len(self.words)
        self.vocab_size = self.eos + 1
        self._ids = {word: FIRST_WORD + i for i, word in enumerate(self.words)}

    @classmethod
    def from_captions(cls, captions: Iterable[str], context_length: int = 12, min_count: int = 1) -> WordTokenizer:
        """The vocabulary of `captions`: every word seen `min_count` times, in alphabetical order."""
        counts = Counter(word for caption in captions for word in split_words(caption))
        return cls(sorted(word for word, n in counts.items() if n >= min_count), context_length)

    def known(self, word: str) -> bool:
        """True where `word` has an id of its own."""
        return self._lookup(word) != UNKNOWN

    def encode(self, text: str) -> list[int]:
        """The ids of one text, EOS last, without padding."""
        return [self._lookup(word) for word in split_words(text)[: self.context_length - 1]] + [self.eos]

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Ids of a batch of texts, right-padded with 0.

        Returns: [B, context_length] int64.
        """
        rows = [self.encode(text) for text in ([texts] if isinstance(texts, str) else texts)]
        ids = torch.zeros(len(rows), self.context_length, dtype=torch.int64)
        for row, out in zip(rows, ids.numpy(), strict=True):
            out[: len(row)] = row
        return ids

    def _lookup(self, word: str) -> int:
        known = self._ids.get(word)
        # A plural or singular of a known word is nearer to the truth than "unknown".
        if known is None:
            known = self._ids.get(word[:-1] if word.endswith("s") else word + "s", UNKNOWN)
        return known
