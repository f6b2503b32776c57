"""Every setting of LiMBeR's training, checked once; from TOML, from flags, or both."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from limber_fast import checks

_OP = "train-limber"


@dataclass(frozen=True)
class LimberTrainConfig:
    """LiMBeR's own values by default (its code at ed3e942); every field is a flag of `limber-fast train-limber`.

    Attributes:
        language_model: folder of a GPT-J, of Hugging Face or of `GPTJ.save_pretrained`.
        data: 'emoji', or a folder in LiMBeR's layout (images/<n>/*.jpg, image_data/<n>/*.json), or a captions file of
            COCO (.json), whose pictures are in the folder `images`, or WebDataset shards, as 'cc3m-{00000..00331}.tar';
            several patterns with commas between them.
        output: folder for the checkpoint, the log and the trained map; to resume, processes on several machines share
            it or have copies of the checkpoint, and for `cache_features` they share it.
        encoder: a name of `limber_fast.models.encoders.encoder`.
        encoder_weights: file of its weights; '' for the pre-trained ones, 'random' for none.
        tokenizer: folder of a tokenizer of transformers; by default the language model's.
        steps, batch_size: optimiser steps, and pictures in each, over all processes.
        micro_batch: pictures in one forward pass of one process; gradients add up to a batch.
        learning_rate, warmup, beta1, beta2, weight_decay, grad_clip: AdamW; the rate rises over `warmup` steps and
            falls linearly to 0 at `steps`; grad_clip 0 clips nothing.
        encoder_learning_rate: above 0 the encoder is tuned at this rate (2e-6 for 'NFRN50 tuned').
        dropout, layer_norm: of the soft prompts; layer_norm as in MAGMA.
        adapters: above 0 MAGMA's adapters of this width (a quarter of the language model's there) are trained too, at
            `learning_rate`.
        grad_checkpointing: keep the input of each block of the language model alone, and compute blocks twice.
        cache_features: run a frozen encoder once over all pictures and keep the features in a file of `output`.
        save_every: steps between checkpoints. seed: of the map's first weights, the order, captions and dropout.
        tensorboard: also log there.

    Raises: ValueError naming the field and what it must be.
    """

    language_model: str
    data: str = "emoji"
    images: str = ""
    output: str = "limber_fast_limber"
    encoder: str = "clip"
    encoder_weights: str = ""
    tokenizer: str = ""
    steps: int = 15_000
    batch_size: int = 2048
    micro_batch: int = 8
    learning_rate: float = 8e-4
    warmup: int = 100
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    encoder_learning_rate: float = 0.0
    dropout: float = 0.1
    layer_norm: bool = False
    adapters: int = 0
    grad_checkpointing: bool = False
    cache_features: bool = False
    save_every: int = 100
    seed: int = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        settle_kinds(_OP, self)
        for name in ("steps", "batch_size", "micro_batch", "save_every"):
            checks.size(_OP, name, getattr(self, name))
        for name in ("learning_rate", "warmup", "weight_decay", "grad_clip", "encoder_learning_rate", "adapters"):
            checks.not_negative(_OP, name, getattr(self, name))
        checks.seed(_OP, "seed", self.seed)
        for name in ("beta1", "beta2", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise checks.invalid(_OP, name, "lie in [0, 1)", repr(getattr(self, name)))
        if self.warmup >= self.steps:
            raise checks.invalid(_OP, "warmup", f"be less than steps = {self.steps}", repr(self.warmup))
        for name in ("language_model", "data", "output", "encoder"):
            if not getattr(self, name):
                raise checks.invalid(_OP, name, "be given", "''")

    @property
    def tuned(self) -> bool:
        return self.encoder_learning_rate > 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def settle_kinds(op: str, config: Any) -> None:
    """Every field of a frozen dataclass is of its type, and finite; a whole number serves as a float."""
    hints = get_type_hints(type(config))
    for field in fields(config):
        value, kind = getattr(config, field.name), hints[field.name]
        if kind is float and type(value) is int:
            object.__setattr__(config, field.name, value := float(value))
        if type(value) is not kind:
            raise checks.invalid(op, field.name, f"be {kind.__name__}", repr(value), kind=TypeError)
        if kind is float:
            checks.finite(op, field.name, value)


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """--config FILE.toml, and a flag for each field; a flag outranks the file, the file outranks the default."""
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="settings, one field a line")
    hints = get_type_hints(config)
    for field in fields(config):
        flag, kind = f"--{field.name.replace('_', '-')}", hints[field.name]
        shown = "required" if field.default is MISSING else f"default: {field.default!r}"
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=shown)
        else:
            parser.add_argument(flag, type=kind, default=None, metavar=kind.__name__.upper(), help=shown)


def from_flags(config: type, args: argparse.Namespace) -> Any:
    """The settings of parsed flags and their --config file."""
    values = {} if args.config is None else read_toml(args.config)
    known = {field.name for field in fields(config)}
    if unknown := sorted(set(values) - known):
        raise checks.invalid(str(args.config), "the settings", f"be among {', '.join(sorted(known))}", repr(unknown[0]))
    values |= {name: value for name in known if (value := getattr(args, name)) is not None}
    for field in fields(config):
        if field.default is MISSING and field.name not in values:
            flag = field.name.replace("_", "-")
            raise checks.invalid(_OP, field.name, "be given", "nothing", f"--{flag}, or a line in --config")
    return config(**values)


def read_toml(path: Path) -> Mapping[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        from limber_fast.optional import needed

        tomllib = needed("tomli", "--config")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise checks.invalid(str(path), "the file", "be TOML", str(error)) from error
