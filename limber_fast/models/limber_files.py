"""A Limber on disk: the released proj.ckpt, and a folder of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from limber_fast import checks
from limber_fast.files import fill, load_state, replace
from limber_fast.models.encoders import encoder as make_encoder

FORMAT = "limber_fast.Limber/2"
CONFIG, WEIGHTS, ENCODER = "limber.json", "projection.safetensors", "encoder.safetensors"


def load_projection(projection: nn.Linear, path: Path) -> None:
    """Fills `projection` from a state dict with exactly the keys weight and bias, or leaves it as it is and raises."""
    found = load_state(path)
    if set(found) != {"weight", "bias"}:
        keys = ", ".join(sorted(map(str, found))) or "nothing"
        raise checks.invalid(str(path), "the file", "hold weight and bias", keys)
    fill(projection, found, str(path))


def _trained(limber: Any) -> nn.ModuleDict:
    parts = {"projection": limber.projection}
    if limber.layer_norm is not None:
        parts["layer_norm"] = limber.layer_norm
    return nn.ModuleDict(parts)


def save(limber: Any, folder: Path) -> None:
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    encoder = limber.encoder
    tuned = encoder is not None and any(p.requires_grad for p in encoder.parameters())
    config = {
        "format": FORMAT,
        "encoder": None if encoder is None else {
            "name": encoder.name, "weights": encoder.weights, "seed": encoder.seed,
        },
        "tuned": tuned,
        "width": limber.projection.in_features,
        "n_embd": limber.projection.out_features,
        "dropout": limber.dropout,
        "layer_norm": limber.layer_norm is not None,
    }
    tensors = {name: p.detach().cpu().contiguous() for name, p in _trained(limber).named_parameters()}
    replace(folder / WEIGHTS, save(tensors, {"format": FORMAT}))
    if tuned:
        state = {name: x.detach().cpu().contiguous() for name, x in encoder.trunk.state_dict().items()}
        replace(folder / ENCODER, save(state, {"format": FORMAT}))
    replace(folder / CONFIG, (json.dumps(config, indent=1) + "\n").encode())


def load(cls: Any, folder: Path, language_model: Any, tokenizer: Any, encoder: Any) -> Any:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise checks.invalid(str(path), "the file", "be JSON", str(error)) from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = repr(config.get("format")) if isinstance(config, dict) else checks.kind_of(config)
        raise checks.invalid(str(path), "format", f"be {FORMAT!r}", found)
    for name, kind in (("width", int), ("n_embd", int), ("dropout", float), ("layer_norm", bool), ("tuned", bool)):
        if not isinstance(config.get(name), kind):
            raise checks.invalid(str(path), name, f"be {kind.__name__}", repr(config.get(name)))
    if config["n_embd"] != language_model.config.n_embd:
        contract = f"be of width {config['n_embd']}, as the projection"
        raise checks.invalid(str(path), "language_model", contract, str(language_model.config.n_embd))
    if encoder == "saved":
        encoder = config["encoder"] and make_encoder(**config["encoder"])
        if config["tuned"]:
            fill(encoder.trunk, load_state(folder / ENCODER), str(folder / ENCODER))
    elif isinstance(encoder, str):
        encoder = make_encoder(encoder)
    limber = cls(
        encoder, language_model, tokenizer, width=config["width"], dropout=config["dropout"],
        layer_norm=config["layer_norm"],
    )  # fmt: skip
    if encoder is not None and encoder.width != config["width"]:
        contract = f"give {config['width']} features"
        raise checks.invalid(str(path), "encoder", contract, f"{encoder.name} with {encoder.width}")
    tensors = load_state(folder / WEIGHTS)
    trained = _trained(limber)
    if set(tensors) != {name for name, _ in trained.named_parameters()}:
        found = ", ".join(sorted(tensors))
        raise checks.invalid(str(folder / WEIGHTS), "the file", "hold the projection's tensors", found)
    fill(trained, tensors, str(folder / WEIGHTS))
    return limber
