"""NoCaps: scores of images with in-domain, near-domain and out-of-domain objects (arXiv 1812.08658, section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from limber_fast import checks
from limber_fast.data.captions import DOMAINS
from limber_fast.evaluation.cider import DocumentFrequency, Tokenize, cider_d
from limber_fast.evaluation.tokenize import ptb_tokenize

ALL = "all"


def by_domain(scores: np.ndarray, domains: Sequence[str]) -> dict[str, np.ndarray]:
    """`scores` of each domain that occurs, in the order of `DOMAINS`, and of all images.

    Args:
        scores: [N], finite, of any metric. domains: [N], each one of `DOMAINS`.
    """
    scores = np.asarray(scores, np.float64)
    checks.finite_scores("by_domain", "scores", scores)
    rows = _rows("by_domain", domains, scores)
    return {domain: scores[index] for domain, index in rows.items()}


def nocaps_cider_d(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    domains: Sequence[str],
    *,
    document_frequency: Mapping[str, DocumentFrequency] | None = None,
    tokenize: Tokenize = ptb_tokenize,
) -> dict[str, np.ndarray]:
    """CIDEr-D of every image, each domain scored as a set of its own, and all images together.

    So are published figures: an image scores differently in its domain than among all, as words that are rare in one
    are not in the other.

    Args:
        document_frequency: by domain, and for "all", of a larger set of references; by default of `references`.
    Returns: "in-domain", "near-domain", "out-domain", those that occur, and "all": [images of the domain] fp64.
    """
    checks.texts("nocaps_cider_d", "captions", captions)
    checks.text_sets("nocaps_cider_d", "references", references, "captions", captions)
    frequency = document_frequency or domain_frequencies(references, domains, tokenize)
    return {
        domain: cider_d(
            [captions[row] for row in index],
            [references[row] for row in index],
            document_frequency=frequency[domain],
            tokenize=tokenize,
        )
        for domain, index in _rows("nocaps_cider_d", domains, captions).items()
    }


def domain_frequencies(
    references: Sequence[Sequence[str]], domains: Sequence[str], tokenize: Tokenize = ptb_tokenize
) -> dict[str, DocumentFrequency]:
    """Document frequency of each domain that occurs, and of all images."""
    rows = _rows("domain_frequencies", domains, references)
    return {
        domain: DocumentFrequency.of([references[row] for row in index], tokenize) for domain, index in rows.items()
    }


def _rows(op: str, domains: Sequence[str], like: Sequence) -> dict[str, list[int]]:
    checks.as_long(op, "domains", domains, "the scored images", like)
    for row, domain in enumerate(domains):
        checks.choice(op, f"domains[{row}]", domain, DOMAINS)
    rows = {domain: [row for row, found in enumerate(domains) if found == domain] for domain in DOMAINS}
    return {domain: index for domain, index in rows.items() if index} | {ALL: list(range(len(domains)))}
