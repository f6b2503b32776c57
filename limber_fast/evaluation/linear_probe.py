"""Linear probe: logistic regression by L-BFGS on frozen image features (arXiv 2103.00020, appendix A.3)."""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

Labelled = tuple[np.ndarray, np.ndarray]
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)


def _probe(strength: float) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, solver="lbfgs", max_iter=1000))


def linear_probe(train: Labelled, validation: Labelled, tests: dict[str, Labelled]) -> dict[str, float]:
    """Accuracy in percent on each test set, with C chosen on `validation` and the probe refitted on both.

    Args:
        train, validation, tests[name]: (features [N, D], labels [N]); validation shares no family with train.
    """
    scores = {c: _probe(c).fit(*train).score(*validation) for c in STRENGTHS}
    best = max(scores, key=scores.__getitem__)
    both = [np.concatenate(pair) for pair in zip(train, validation, strict=True)]
    probe = _probe(best).fit(*both)
    return {"C": best, **{name: 100 * probe.score(*test) for name, test in tests.items()}}
