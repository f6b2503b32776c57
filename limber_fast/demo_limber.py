"""The demo's second half: the trained CLIP's image tower, mapped into a frozen language model, and controls."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from limber_fast.console import Console
from limber_fast.evaluation.emoji_limber import Benchmark, Row, shuffled, summary
from limber_fast.models.clip import SmallResNet
from limber_fast.models.limber import Limber
from limber_fast.models.small_language_model import small_language_model
from limber_fast.training.drawings import Drawings
from limber_fast.training.projection import SOFT_PROMPTS, Standardise, fit_projection, grid_features

WHITE = 255


@dataclass
class LimberResult:
    """Rows in the table's order with their summaries, and what the page shows of them."""

    rows: list[Row] = field(default_factory=list)
    summaries: dict[str, dict] = field(default_factory=dict)
    ceiling: float = 0.0
    steps: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


def run(
    visual: SmallResNet, train: Drawings, test: Drawings, *, seconds: float, seed: int, console: Console,
    asked: int, clock: Callable[[], float] = time.perf_counter,
) -> tuple[LimberResult, Benchmark]:  # fmt: skip
    """Fits P for `visual` and for the same tower with random weights, `seconds` each, on `train`; tests all on `test`.

    Blind: the CLIP's map, given the features of a white picture. Shuffled: given those of another drawing.
    """
    started, found = time.monotonic(), LimberResult()
    benchmark = Benchmark(train, test, seed=0, asked=asked)
    language_model, tokenizer = small_language_model()
    torch.manual_seed(seed)
    config_width = visual.stem.out_channels
    untrained = SmallResNet(visual.head.out_features, visual.image_size[0], config_width)
    fitted: dict[str, tuple[Limber, Tensor, Tensor]] = {}
    towers = {"CLIP": visual, "random": untrained}
    for name, tower in towers.items():
        features = grid_features(tower, train.images)
        standard = Standardise.of(features)
        features, tested = standard(features), standard(grid_features(tower, test.images))
        limber = Limber(None, language_model, tokenizer, width=SOFT_PROMPTS * features.shape[1])
        with console.progress(f"fitting P, {name}", 1.0) as update:
            watch = _watch(update)
            found.steps[name] = fit_projection(limber, features, train, seconds, seed=seed, clock=clock, watch=watch)
        fitted[name] = (limber, features, tested)
        if name == "CLIP":
            white = torch.full_like(test.images[:1], WHITE)
            blind = standard(grid_features(tower, white)).expand(len(test), -1)
    limber, features, tested = fitted["CLIP"]
    cases = {
        "CLIP": fitted["CLIP"],
        "random": fitted["random"],
        "blind": (limber, features, blind),
        "shuffled": (limber, features, shuffled(tested, seed)),
    }
    with console.progress("captions and answers", len(cases) * benchmark.steps) as update:
        for index, (name, case) in enumerate(cases.items()):

            def progress(done: int, index: int = index, name: str = name) -> None:
                update(index * benchmark.steps + done, row=name)

            found.rows.append(benchmark.run(name, *case, progress))
    found.rows += [benchmark.majority(), benchmark.oracle(limber)]
    found.ceiling = benchmark.ceiling
    found.summaries = {row.name: summary(row, benchmark) for row in found.rows}
    found.seconds = time.monotonic() - started
    return found, benchmark


def _watch(update: Callable[..., None]) -> Callable[[float, float], None]:
    return lambda fraction, loss: update(fraction, loss=loss)


def bars(found: LimberResult) -> list[tuple[str, str, bool]]:
    """What one seed has to show: (what, the figures, whether it did)."""

    def group(name: str, shots: int = 0) -> float:
        return found.summaries[name]["vqa"]["group"][str(shots)]["mean"]

    most = group("most frequent answer")
    clip, untrained = group("CLIP"), group("random")
    captions = [found.summaries[name]["cider_d"]["mean"] for name in ("CLIP", "random")]
    named = found.summaries["CLIP"]["name_seen"]["mean"]
    return [
        ("group questions, 0 shots: CLIP at least random + 15", f"{clip:.1f}, {untrained:.1f}", clip >= untrained + 15),
        ("blind at most the most frequent answer + 5", f"{group('blind'):.1f}, {most:.1f}", group("blind") <= most + 5),
        (
            "shuffled at most the most frequent answer + 5",
            f"{group('shuffled'):.1f}, {most:.1f}",
            group("shuffled") <= most + 5,
        ),
        ("CIDEr-D: CLIP above random", f"{captions[0]:.1f}, {captions[1]:.1f}", captions[0] > captions[1]),
        ("names of seen concepts, exact match: at least 15", f"{named:.1f}", named >= 15),
    ]
