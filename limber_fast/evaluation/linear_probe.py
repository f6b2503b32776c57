"""Linear probe: logistic regression by L-BFGS on frozen image features (arXiv 2103.00020, appendix A.3)."""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

Labelled = tuple[np.ndarray, np.ndarray]
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
LIMITS = (1e-6, 1e6)


def probe_of(strength: float) -> Pipeline:
    """The probe with C = `strength`, not fitted."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, solver="lbfgs", max_iter=1000))


def fit_probe(train: Labelled, validation: Labelled, *, search: bool = False) -> tuple[float, Pipeline]:
    """(C, the probe fitted on both), with C chosen on `validation` among `STRENGTHS`.

    Args: search: go on in steps of ten, within `LIMITS`, while the best C is the first or the last.
    """
    scores = {c: probe_of(c).fit(*train).score(*validation) for c in STRENGTHS}
    while True:
        best = max(scores, key=scores.__getitem__)
        beyond = {min(scores): best / 10, max(scores): best * 10}.get(best, 0.0)
        if not search or not LIMITS[0] <= beyond <= LIMITS[1]:
            break
        scores[beyond] = probe_of(beyond).fit(*train).score(*validation)
    both = [np.concatenate(pair) for pair in zip(train, validation, strict=True)]
    return best, probe_of(best).fit(*both)


def linear_probe(train: Labelled, validation: Labelled, tests: dict[str, Labelled]) -> dict[str, float]:
    """Accuracy in percent on each test set, with C chosen on `validation` and the probe refitted on both.

    Args:
        train, validation, tests[name]: (features [N, D], labels [N]); validation shares no family with train.
    """
    best, probe = fit_probe(train, validation)
    return {"C": best, **{name: 100 * probe.score(*test) for name, test in tests.items()}}
