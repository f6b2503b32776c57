"""Bootstrap intervals: known spread, coverage, images drawn with all their scores."""

import numpy as np
import pytest

from limber_fast.evaluation.bootstrap import bootstrap_interval, bootstrap_intervals


def test_agrees_with_the_central_limit():
    scores = np.random.default_rng(0).gamma(2.0, 3.0, 4000)
    found = bootstrap_interval(scores)
    error = scores.std() / np.sqrt(len(scores))
    assert found.mean == scores.mean()
    assert [found.low, found.high] == pytest.approx(
        [found.mean - 1.96 * error, found.mean + 1.96 * error], abs=error / 10
    )
    narrow = bootstrap_interval(scores, confidence=0.5)
    assert narrow.high - narrow.low == pytest.approx(2 * 0.6745 * error, rel=0.05)


def test_covers_the_true_mean_as_often_as_it_says():
    generator = np.random.default_rng(1)
    intervals = [bootstrap_interval(generator.random(60) < 0.4, resamples=800) for _ in range(400)]
    covered = np.mean([low <= 0.4 <= high for _, low, high in intervals])
    assert 0.91 < covered < 0.98  # a standard error of 1.1 points, and a percentile interval is a little narrow


def test_questions_of_an_image_are_drawn_together():
    per_image = np.random.default_rng(2).random(50)
    images = np.repeat([f"image {i}" for i in range(50)], 20)
    together = bootstrap_interval(np.repeat(per_image, 20), images=images.tolist())
    alone = bootstrap_interval(per_image)
    assert together.mean == pytest.approx(alone.mean)
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high), abs=1e-12)
    apart = bootstrap_interval(np.repeat(per_image, 20))
    assert apart.high - apart.low < 0.3 * (alone.high - alone.low)


def test_images_count_by_their_scores():
    scores, images = [1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"]
    found = bootstrap_interval(scores, images=images)
    assert (found.mean, found.low, found.high) == (0.75, 0.0, 1.0)


def test_seeded_and_chunked_alike(monkeypatch):
    scores = np.random.default_rng(3).random(100)
    first = bootstrap_interval(scores, seed=5)
    assert bootstrap_interval(scores, seed=5) == first != bootstrap_interval(scores, seed=6)
    monkeypatch.setattr("limber_fast.evaluation.bootstrap._CHUNK", 700)
    assert bootstrap_interval(scores, seed=5) == first


def test_columns_share_their_draws():
    scores = np.random.default_rng(4).random((70, 2))
    columns = np.stack([*scores.T, scores[:, 0] - scores[:, 1]], 1)
    first, second, difference = bootstrap_intervals(columns, seed=2)
    for found, column in zip((first, second, difference), columns.T, strict=True):
        assert found == pytest.approx(bootstrap_interval(column, seed=2), abs=1e-12)
    assert difference.mean == pytest.approx(first.mean - second.mean)


def test_errors():
    with pytest.raises(
        ValueError, match=r"bootstrap_intervals: scores must be finite; got nan at \[1, 0\], 1 such in all"
    ):
        bootstrap_interval([0.0, float("nan")])
    with pytest.raises(ValueError, match=r"scores must be \[N\]; got shape \(2, 2\)"):
        bootstrap_interval(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="at least one score"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="images must be as long as scores, 2; got 1"):
        bootstrap_interval([0.0, 1.0], images=["a"])
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1; got 95"):
        bootstrap_interval([0.0, 1.0], confidence=95)
