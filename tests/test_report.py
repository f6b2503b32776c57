"""The demo's page from made-up results: what must stand on it whatever the model learnt."""

from __future__ import annotations

import html

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("open_clip")

from limber_fast.data import emoji
from limber_fast.evaluation.emoji import Evaluation, Example
from limber_fast.report import loss_timing
from limber_fast.report.demo import ROW_NAMES, write_report

SHARES = {"top1": 10.0, "top5": 30.0}
HISTORY = [{"seconds": s, "image_text_loss": 5.0, "image_image_loss": 4.0, "accuracy": 0.1, "scale": 14.0}
           for s in (1.0, 2.0)]  # fmt: skip
RUN = {
    "threads": 1,
    "loss": "eager",
    "machine": {"processor": "abacus"},
    "training": {"steps": 2, "seconds": 2.0, "batch": 4, "images": 8, "images_per_second": 4.0, "parameters": 100},
}


def test_page_credits_every_vendor(tmp_path):
    table = {**SHARES, "images": 3, "classes": 9, "chance": SHARES, "pixel": SHARES}
    probe = {"seen": 50.0, "seen_majority": 20.0, "unseen": 40.0, "unseen_majority": 20.0, "C": 1.0}
    drawn = Example(torch.zeros(3, 8, 8, dtype=torch.uint8), "cat", [("cat", 0.9)])
    found = Evaluation(dict.fromkeys(ROW_NAMES, table), probe, ["animals", "food"], np.eye(2, dtype=np.int64), [drawn])
    write_report(tmp_path / "report.html", RUN, HISTORY, found, "", [])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(emoji.credits()) == len(emoji.STYLES)
    for line in emoji.credits():
        assert html.escape(line) in page


def test_a_point_of_the_loss_that_fails_says_why():
    good, bad = (next(loss_timing.sweep(1, 60, backend)) for backend in ("auto", "abacus"))
    assert good.seconds > 0 and good.peak_mib > 0 and not good.skipped
    assert bad.seconds is None and "abacus" in bad.skipped
