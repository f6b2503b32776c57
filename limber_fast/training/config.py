"""Every setting of a training run, checked once.

The values were chosen on a split of the training vendors alone (`TestSet.validation`), never on the test vendor;
`training/SETTINGS.md` lists the trials.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from limber_fast import checks


def _check(owner: str, values: dict[str, float], low: float, high: float) -> None:
    for name, value in values.items():
        if not low <= value <= high:
            raise ValueError(f"{owner}: {name} must lie in [{low:g}, {high:g}]; got {value!r}")


@dataclass(frozen=True)
class AugmentConfig:
    """Strength of the image augmentation; lengths are fractions of the image side."""

    scale_low: float = 0.85
    scale_high: float = 1.3
    aspect: float = 0.15
    rotation_degrees: float = 15.0
    shift: float = 0.08
    flip: float = 0.1
    elastic: float = 0.03
    hue: float = 0.25
    hue_degrees: float = 180.0
    saturation_low: float = 0.7
    saturation_high: float = 1.3
    gray: float = 0.1
    channel_gain: float = 0.15

    def __post_init__(self) -> None:
        _check("AugmentConfig", {"flip": self.flip, "hue": self.hue, "gray": self.gray}, 0, 1)
        if not 0 < self.scale_low <= self.scale_high:
            raise ValueError(f"AugmentConfig: 0 < scale_low <= scale_high; got {self.scale_low}, {self.scale_high}")


@dataclass(frozen=True)
class CaptionConfig:
    """How often a caption is in translation, how often the name, and what is added to it."""

    name: float = 0.6
    translated: float = 0.0
    with_tags: float = 0.6
    with_subgroup: float = 0.2
    max_tags: int = 4
    word_dropout: float = 0.3

    def __post_init__(self) -> None:
        rates = ("name", "translated", "with_tags", "with_subgroup", "word_dropout")
        _check("CaptionConfig", {rate: getattr(self, rate) for rate in rates}, 0, 1)


@dataclass(frozen=True)
class TrainConfig:
    """One training run. `minutes` is wall time spent in steps; the schedule follows the fraction spent. With `steps` it
    is that many steps instead, however long they take: the same encoders on a fast machine and on a slow one.

    From the fraction `lock_images` on the image tower is locked, and the texts are learned from `locked_captions`.

    Raises: ValueError naming the field and the range it must lie in.
    """

    minutes: float = 5.0
    steps: int = 0
    seed: int = 0
    concepts_per_batch: int = 128
    images_per_concept: int = 2
    learning_rate: float = 2e-3
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.3
    muon_learning_rate: float = 0.02
    muon_momentum: float = 0.95
    muon_weight_decay: float = 0.1
    warmup: float = 0.08
    grad_clip: float = 1.0
    ema: float = 0.99
    image_weight: float = 0.3
    lock_images: float = 0.9
    locked_concepts: int = 256
    locked_views: int = 4
    label_smoothing: float = 0.2
    backend: str = "auto"
    save_every_seconds: float = 30.0
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    locked_captions: CaptionConfig = field(default_factory=lambda: CaptionConfig(translated=0.6))

    def __post_init__(self) -> None:
        _check("TrainConfig", {"minutes": self.minutes}, 1e-3, 1e5)
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 0:
            raise ValueError(f"TrainConfig: steps must be a whole number of at least 0; got {self.steps!r}")
        checks.seed("TrainConfig", "seed", self.seed)
        _check("TrainConfig", {"concepts_per_batch": self.concepts_per_batch}, 2, 1e6)
        _check("TrainConfig", {"images_per_concept": self.images_per_concept}, 2, 16)
        _check("TrainConfig", {"lock_images": self.lock_images}, 0.01, 1)
        _check("TrainConfig", {"locked_concepts": self.locked_concepts}, 2, 1e6)
        _check("TrainConfig", {"locked_views": self.locked_views}, 1, 64)
        _check("TrainConfig", {"label_smoothing": self.label_smoothing}, 0, 0.99)
        for names, low, high in (
            (("learning_rate", "muon_learning_rate", "grad_clip"), 1e-8, 1e3),
            (("beta1", "beta2", "muon_momentum", "warmup", "ema"), 0, 0.9999),
            (("weight_decay", "muon_weight_decay", "image_weight"), 0, 10),
        ):
            _check("TrainConfig", {name: getattr(self, name) for name in names}, low, high)

    def to_dict(self) -> dict:
        """Plain numbers and strings, for checkpoints and reports."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> TrainConfig:
        """The inverse of `to_dict`."""
        nested = {name: CaptionConfig(**values[name]) for name in ("captions", "locked_captions")}
        nested["augment"] = AugmentConfig(**values["augment"])
        return cls(**{**values, **nested})
