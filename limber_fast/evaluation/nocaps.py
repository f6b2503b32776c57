"""NoCaps: scores of images with in-domain, near-domain and out-of-domain objects (arXiv 1812.08658, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from limber_fast import checks
from limber_fast.data.captions import DOMAINS
from limber_fast.evaluation.cider import DocumentFrequency, cider_d

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
    document_frequency: DocumentFrequency | None = None,
) -> dict[str, np.ndarray]:
    """CIDEr-D of every image, each domain scored as a set of its own, and all images together.

    An image scores differently in its domain than among all, as rare and frequent words differ between them; with
    `document_frequency` the words weigh the same everywhere.

    Returns: "in-domain", "near-domain", "out-domain", those that occur, and "all": [images of the domain] fp64.
    """
    checks.texts("nocaps_cider_d", "captions", captions)
    checks.text_sets("nocaps_cider_d", "references", references, "captions", captions)
    rows = _rows("nocaps_cider_d", domains, captions)
    return {
        domain: cider_d(
            [captions[row] for row in index], [references[row] for row in index], document_frequency=document_frequency
        )
        for domain, index in rows.items()
    }


def _rows(op: str, domains: Sequence[str], like: Sequence) -> dict[str, list[int]]:
    checks.as_long(op, "domains", domains, "the scored images", like)
    for row, domain in enumerate(domains):
        checks.choice(op, f"domains[{row}]", domain, DOMAINS)
    rows = {domain: [row for row, found in enumerate(domains) if found == domain] for domain in DOMAINS}
    return {domain: index for domain, index in rows.items() if index} | {ALL: list(range(len(domains)))}
