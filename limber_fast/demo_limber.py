"""The demo's second half: image towers, each mapped into a frozen language model, and controls."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from limber_fast import files
from limber_fast.console import Console
from limber_fast.evaluation.emoji_limber import Benchmark, Row, TextScorer, shuffled, summary
from limber_fast.models.clip import SmallResNet
from limber_fast.models.limber import Limber
from limber_fast.models.small_language_model import FOLDER, small_language_model
from limber_fast.training.drawings import Drawings
from limber_fast.training.projection import SOFT_PROMPTS, Standardise, fit_projection, grid_features

WHITE = 255
# Rows in the table's order; a run has those whose towers it is given.
CLIP, LABELS, PIXELS, TUNED, RANDOM = "CLIP", "label-supervised", "self-supervised", "label-supervised, tuned", "random"
BLIND, SHUFFLED, MAJORITY, TOLD = "blind", "shuffled", "most frequent answer", "told in words"
ORDER = (CLIP, LABELS, TUNED, PIXELS, RANDOM, BLIND, SHUFFLED, MAJORITY, TOLD)


@dataclass
class LimberResult:
    """Rows in the table's order with their summaries; `steps` of each fit; rows `left_out` for want of time."""

    rows: dict[str, Row] = field(default_factory=dict)
    summaries: dict[str, dict] = field(default_factory=dict)
    ceiling: float = 0.0
    steps: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Fit:
    """How P is fitted and asked: seconds a tower, seed, questions of a kind."""

    seconds: float
    seed: int
    asked: int


class Said:
    """What rows said, a JSON file each in `folder`, so that a resumed demo neither fits nor asks twice.

    A file counts while its key does: tower, language model and fit.
    """

    def __init__(self, folder: Path, fit: Fit):
        self.folder, self.fit = folder, fit
        self.language_model = b"".join(path.read_bytes() for path in sorted(FOLDER.glob("*.safetensors")))

    def key(self, tower: SmallResNet | None = None) -> str:
        found = hashlib.sha256(self.language_model)
        found.update(json.dumps(asdict(self.fit)).encode())
        for name, tensor in tower.state_dict().items() if tower is not None else ():
            found.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return found.hexdigest()

    def load(self, name: str, key: str) -> tuple[Row, int] | None:
        """(the row, steps of its fit), None where there is none of this key."""
        try:
            found = json.loads(self._path(name).read_text(encoding="utf-8"))
            if found["key"] != key:
                return None
            answers = {kind: {int(n): texts for n, texts in x.items()} for kind, x in found["answers"].items()}
            return Row(name, found["captions"], answers), found["steps"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # absent, or not a file of ours
            return None

    def save(self, row: Row, key: str, steps: int = 0) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        said = {"key": key, "steps": steps, "captions": row.captions, "answers": row.answers}
        files.replace(self._path(row.name), json.dumps(said, ensure_ascii=False) + "\n")

    def _path(self, name: str) -> Path:
        return self.folder / f"{name.replace(',', '').replace(' ', '-')}.json"


def untrained(visual: SmallResNet, seed: int) -> SmallResNet:
    """The same tower with random weights: the random version of every other row, which have one architecture."""
    torch.manual_seed(seed)
    return SmallResNet(visual.head.out_features, visual.image_size[0], visual.stem.out_channels)


def run(
    towers: dict[str, SmallResNet], benchmark: Benchmark, fit: Fit, said: Said, console: Console,
    scorer: TextScorer | None = None, clock: Callable[[], float] = time.perf_counter, until: float = math.inf,
) -> LimberResult:  # fmt: skip
    """Fits P for each tower on the training drawings and asks all the same questions about the test's.

    Args:
        towers: by names in `ORDER`, `CLIP` among them; that of `TUNED` is copied, and tuned with P.
        scorer: for CLIPScore.
        until: of `time.monotonic`, when the last row behind CLIP's has to be there; what would come later is left out.

    Random: CLIP's tower with random weights. Blind: CLIP's map, given the features of a white picture. Shuffled: given
    those of another drawing.
    """
    started, found = time.monotonic(), LimberResult(ceiling=benchmark.ceiling)
    language_model, tokenizer = small_language_model()
    cases = {**towers, RANDOM: untrained(towers[CLIP], fit.seed)}
    rows: dict[str, Row] = {}
    asking = 0.0  # seconds of a row's captions and answers

    def late(name: str, seconds: float) -> bool:
        if is_late := time.monotonic() + seconds > until:
            found.left_out.append(name)
        return is_late

    for name, tower in cases.items():
        key = said.key(tower)
        wanted = (CLIP, BLIND, SHUFFLED) if name == CLIP else (name,)
        if all(loaded := [said.load(x, key) for x in wanted]):
            rows |= {row.name: row for row, _ in loaded}
            found.steps[name] = loaded[0][1]
            continue
        if name != CLIP and late(name, fit.seconds + asking):
            continue
        limber, encode = _fitted(name, tower, benchmark.train, fit, (language_model, tokenizer), found, console, clock)
        asked = time.monotonic()
        trained, tested = encode(benchmark.train.images), encode(benchmark.test.images)
        shown = {name: tested}
        if name == CLIP:
            white = torch.full_like(benchmark.test.images[:1], WHITE)
            shown |= {BLIND: encode(white).expand_as(tested), SHUFFLED: shuffled(tested, fit.seed)}
        with console.progress(f"captions and answers, {name}", len(shown) * benchmark.steps) as update:
            for index, (row, features) in enumerate(shown.items()):

                def progress(done: int, index: int = index, row: str = row) -> None:
                    update(index * benchmark.steps + done, row=row)

                rows[row] = benchmark.run(row, limber, trained, features, progress)
                said.save(rows[row], key, found.steps[name])
        asking = (time.monotonic() - asked) / len(shown)
    if (loaded := said.load(TOLD, said.key())) is not None:
        rows[TOLD] = loaded[0]
    elif not late(TOLD, asking):
        rows[TOLD] = benchmark.oracle(language_model, tokenizer)
        said.save(rows[TOLD], said.key())
    rows[MAJORITY] = benchmark.majority()
    found.rows = {name: benchmark.score(rows[name], scorer) for name in ORDER if name in rows}
    found.summaries = {name: summary(row, benchmark) for name, row in found.rows.items()}
    found.seconds = time.monotonic() - started
    return found


def _fitted(
    name: str, tower: SmallResNet, train: Drawings, fit: Fit, words: tuple, found: LimberResult, console: Console,
    clock: Callable[[], float],
) -> tuple[Limber, Callable[[Tensor], Tensor]]:  # fmt: skip
    """The fitted LiMBeR, and what makes its features of drawings."""
    features = grid_features(tower, train.images)
    standard = Standardise.of(features)
    limber = Limber(None, *words, width=SOFT_PROMPTS * features.shape[1], dropout=0.0)
    tuned = copy.deepcopy(tower) if name == TUNED else None
    with console.progress(f"fitting P, {name}", 1.0) as update:
        found.steps[name] = fit_projection(
            limber, standard(features), train, fit.seconds, seed=fit.seed, tuned=tuned, standard=standard, clock=clock,
            watch=lambda fraction, loss: update(fraction, loss=loss),
        )  # fmt: skip
    return limber, lambda images: standard(grid_features(tuned or tower, images))


def merged(results: list[LimberResult]) -> dict[str, dict]:
    """Summaries over seeds: means, and for an interval the lowest and the highest seed's. One seed's are its own."""
    if len(results) == 1:
        return results[0].summaries

    def merge(parts: list) -> dict | None:
        if parts[0] is None:
            return None
        if "mean" in parts[0]:
            means = [part["mean"] for part in parts]
            return {"mean": sum(means) / len(means), "low": min(means), "high": max(means)}
        return {key: merge([part[key] for part in parts]) for key in parts[0]}

    return {name: merge([result.summaries[name] for result in results]) for name in results[0].summaries}


def bars(summaries: dict[str, dict]) -> list[tuple[str, str, bool]]:
    """What the table has to show: (what, the figures, whether it did)."""

    def group(name: str) -> list[float]:
        """By shots; what needs no pictures has none but 0."""
        return [found["mean"] for found in summaries[name]["vqa"]["group"].values()]

    def cider(name: str) -> float:
        return summaries[name]["cider_d"]["mean"]

    most, found = group(MAJORITY)[0], []
    for name in (CLIP, LABELS):
        if name in summaries and RANDOM in summaries:
            random = group(RANDOM)[0]
            what, trained = f"group questions, 0 shots: {name} at least random + 15", group(name)[0]
            found.append((what, f"{trained:.1f}, {random:.1f}", trained >= random + 15))
    for name in (BLIND, SHUFFLED):
        shots = " / ".join(summaries[name]["vqa"]["group"])
        what = f"group questions, {shots} shots: {name} at most the most frequent answer + 5"
        figures = f"{' / '.join(f'{x:.1f}' for x in group(name))}, {most:.1f}"
        found.append((what, figures, max(group(name)) <= most + 5))
    for name in (LABELS, PIXELS, RANDOM):
        if name in summaries:
            figures = f"{cider(CLIP):.1f}, {cider(name):.1f}"
            found.append((f"CIDEr-D: CLIP above {name}", figures, cider(CLIP) > cider(name)))
    named = summaries[CLIP]["name_seen"]["mean"]
    found.append(("names of seen concepts, exact match: at least 15", f"{named:.1f}", named >= 15))
    return found


def missed_orders(summaries: dict[str, dict]) -> list[str]:
    """Where CIDEr-D does not fall as in the paper, CLIP > label-supervised > self-supervised > random: one sentence
    each."""
    names = [name for name in (CLIP, LABELS, PIXELS, RANDOM) if name in summaries]
    cider = {name: summaries[name]["cider_d"]["mean"] for name in names}
    return [
        f"{better} is not above {worse} in CIDEr-D: {cider[better]:.1f} against {cider[worse]:.1f}."
        for at, better in enumerate(names)
        for worse in names[at + 1 :]
        if cider[better] <= cider[worse]
    ]
