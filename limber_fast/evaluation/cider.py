"""CIDEr-D in Python alone: no Java, and the document frequency may come from elsewhere (arXiv 1411.5726, section 4)."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from limber_fast import checks
from limber_fast.data.index import Index
from limber_fast.evaluation.tokenize import ptb_tokenize
from limber_fast.files import replace

LONGEST = 4
SIGMA = 6.0
Ngram = tuple[str, ...]
Tokenize = Callable[[str], Sequence[str]]


@dataclass(frozen=True)
class DocumentFrequency:
    """In how many images an n-gram occurs: `counts[ngram]` of `images` sets of references.

    An image is one document, however many of its references hold the n-gram.
    """

    images: int
    counts: dict[Ngram, int]

    def __post_init__(self) -> None:
        checks.size("DocumentFrequency", "images", self.images)

    def save(self, path: str | Path) -> None:
        """As JSON, in one rename: counting the references of all of COCO takes longer than scoring a split."""
        counts = {" ".join(ngram): count for ngram, count in self.counts.items()}
        replace(Path(path), json.dumps({"images": self.images, "counts": counts}, ensure_ascii=False))

    @classmethod
    def load(cls, path: str | Path) -> DocumentFrequency:
        """What `save` wrote. Raises: BrokenIndex for anything else."""
        file = Index(path)
        images, counts = file.field(file.content, "images", int), file.field(file.content, "counts", dict)
        for ngram, count in counts.items():
            if type(count) is not int or not 1 <= count <= images:
                raise file.broken(f"{ngram!r} must occur in 1 to {images} images; found {count!r}")
        return cls(images, {tuple(ngram.split(" ")): count for ngram, count in counts.items()})

    @classmethod
    def of(cls, references: Sequence[Sequence[str]], tokenize: Tokenize = ptb_tokenize) -> DocumentFrequency:
        """Counted over `references`, a list of captions per image."""
        checks.text_sets("DocumentFrequency.of", "references", references, "references", references)
        return cls._of([[ngrams(tokenize(text)) for text in texts] for texts in references])

    @classmethod
    def _of(cls, counted: Sequence[Sequence[Counter[Ngram]]]) -> DocumentFrequency:
        return cls(len(counted), Counter(ngram for texts in counted for ngram in set().union(*texts)))

    def inverse(self, ngram: Ngram) -> float:
        """ln(images / max(1, count))."""
        return math.log(self.images) - math.log(max(1, self.counts.get(ngram, 0)))


def ngrams(tokens: Sequence[str]) -> Counter[Ngram]:
    """How often each n-gram of 1 to 4 tokens occurs."""
    return Counter(
        tuple(tokens[start : start + n]) for n in range(1, LONGEST + 1) for start in range(len(tokens) - n + 1)
    )


def cider_d(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    document_frequency: DocumentFrequency | None = None,
    tokenize: Tokenize = ptb_tokenize,
) -> np.ndarray:
    """CIDEr-D of every caption: clipped tf-idf cosine with its references, less for another length.

    10 / 4 * sum_n mean_r exp(-(l_c - l_r)^2 / (2 * 6^2)) * sum_w min(c_w, r_w) * r_w / (|c| |r|) over the n-grams w of
    n = 1..4 tokens, with c_w and r_w the counts times ln(images / max(1, document frequency)). Lengths are counted
    in bigrams, as in pycocoevalcap, to whose figures these are equal.

    Args:
        captions: one per image.
        references: per image at least one.
        document_frequency: of a larger set of references; by default of `references`. Over one image it is worth
            nothing, and every score is 0.
        tokenize: from a caption to its tokens; `str.split` where they are tokenised already.
    Returns: [N] fp64, 0 to 10. Papers print the mean times 100.
    Raises: ValueError or TypeError for lists of other lengths, without a reference, or that hold no strings.
    """
    checks.texts("cider_d", "captions", captions)
    checks.text_sets("cider_d", "references", references, "captions", captions)
    counted = [[ngrams(tokenize(text)) for text in texts] for texts in references]
    frequency = DocumentFrequency._of(counted) if document_frequency is None else document_frequency
    scores = np.zeros(len(captions))
    for row, (caption, texts) in enumerate(zip(captions, counted, strict=True)):
        found = _Vectors.of(ngrams(tokenize(caption)), frequency)
        scores[row] = np.mean([_similarity(found, _Vectors.of(text, frequency)) for text in texts])
    return 10 * scores


def best_constant(
    references: Sequence[Sequence[str]],
    *,
    document_frequency: DocumentFrequency | None = None,
    tokenize: Tokenize = ptb_tokenize,
) -> str:
    """Of all references the one with the highest mean CIDEr-D where it is the caption of every image; the first of
    equally good ones. No captioner that sees nothing, and says one sentence of these, does better.

    Args: as of `cider_d`.
    """
    checks.text_sets("best_constant", "references", references, "references", references)
    counted = {text: ngrams(tokenize(text)) for texts in references for text in texts}
    if document_frequency is None:
        document_frequency = DocumentFrequency._of([[counted[text] for text in texts] for texts in references])
    vectors = [_Vectors.of(counts, document_frequency) for counts in counted.values()]
    place = {text: row for row, text in enumerate(counted)}
    shares, lengths = np.zeros(len(place)), np.array([vector.length for vector in vectors])
    for texts in references:
        for text in texts:
            shares[place[text]] += 1 / (len(texts) * len(references))
    entries: dict[Ngram, list[tuple[int, float, float]]] = {}  # (reference, weight, weight / norm)
    for row, vector in enumerate(vectors):
        for ngram, weight in vector.unit():
            entries.setdefault(ngram, []).append((row, vector.weights[ngram], weight))
    postings = {ngram: tuple(map(np.array, zip(*found, strict=True))) for ngram, found in entries.items()}

    @cache
    def kept(length: int) -> np.ndarray:
        return shares * np.exp(-((length - lengths) ** 2) / (2 * SIGMA**2))

    @cache
    def unclipped(ngram: Ngram, length: int) -> float:
        rows, _, units = postings[ngram]
        return float(kept(length)[rows] @ units)

    def score(vector: _Vectors) -> float:
        total = 0.0
        for ngram, unit in vector.unit():
            rows, weights, units = postings[ngram]
            weight = vector.weights[ngram]
            total += unit / weight * float(kept(vector.length)[rows] @ (np.minimum(weight, weights) * units))
        return total

    # A score is at most what it is without clipping, which costs little, and all but always near it.
    bounds = np.array([sum(unit * unclipped(ngram, vector.length) for ngram, unit in vector.unit())
                       for vector in vectors])  # fmt: skip
    best, found = -1.0, 0
    for row in np.argsort(-bounds, kind="stable").tolist():
        if bounds[row] < best:
            break
        if (value := score(vectors[row])) > best or (value == best and row < found):
            best, found = value, row
    return list(counted)[found]


class _Vectors(NamedTuple):
    """tf-idf weights, their norm for each n, and the length in bigrams."""

    weights: dict[Ngram, float]
    norms: tuple[float, ...]
    length: int

    @classmethod
    def of(cls, counts: Counter[Ngram], frequency: DocumentFrequency) -> _Vectors:
        weights = {ngram: count * frequency.inverse(ngram) for ngram, count in counts.items()}
        squares = [0.0] * LONGEST
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight * weight
        length = sum(count for ngram, count in counts.items() if len(ngram) == 2)
        return cls(weights, tuple(map(math.sqrt, squares)), length)

    def unit(self) -> Iterator[tuple[Ngram, float]]:
        """Weights of length 1 for each n; none of n-grams that weigh nothing."""
        return ((ngram, w / self.norms[len(ngram) - 1]) for ngram, w in self.weights.items() if w)


def _similarity(caption: _Vectors, reference: _Vectors) -> float:
    products = [0.0] * LONGEST
    for ngram, weight in caption.weights.items():
        if (other := reference.weights.get(ngram)) is not None:
            products[len(ngram) - 1] += min(weight, other) * other
    penalty = math.exp(-((caption.length - reference.length) ** 2) / (2 * SIGMA**2))
    norms = [a * b for a, b in zip(caption.norms, reference.norms, strict=True)]
    cosines = [product / norm if norm else 0.0 for product, norm in zip(products, norms, strict=True)]
    return penalty * sum(cosines) / LONGEST
