"""A Limber on disk: the released proj.ckpt, and a folder of its own."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limber_fast import checks
from limber_fast.models.encoders import encoder as make_encoder

FORMAT = "limber_fast.Limber/1"
CONFIG, WEIGHTS = "limber.json", "projection.safetensors"


def load_projection(projection: nn.Linear, path: Path) -> None:
    """Fills `projection` from a state dict with exactly the keys weight and bias, or leaves it as it is and raises."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise checks.invalid(str(path), "the file", "be a state dict that holds tensors alone", reason) from error
    if not isinstance(found, dict):
        raise checks.invalid(str(path), "the file", "hold a state dict", checks.kind_of(found))
    if set(found) != {"weight", "bias"}:
        keys = ", ".join(sorted(map(str, found))) or "nothing"
        raise checks.invalid(str(path), "the file", "hold weight and bias", keys)
    _fill(projection, found, str(path))


def _fill(module: nn.Module, found: dict[str, Tensor], source: str) -> None:
    for name, parameter in module.named_parameters():
        tensor = found.get(name)
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise checks.invalid(source, f"tensor {name!r}", "be floating point", checks.kind_of(tensor))
        if tensor.shape != parameter.shape:
            expected = f"be {tuple(parameter.shape)}"
            raise checks.invalid(source, f"tensor {name!r}", expected, checks.shape_of(tensor))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(found[name])


def _trained(limber: Any) -> nn.ModuleDict:
    parts = {"projection": limber.projection}
    if limber.layer_norm is not None:
        parts["layer_norm"] = limber.layer_norm
    return nn.ModuleDict(parts)


def save(limber: Any, folder: Path) -> None:
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "format": FORMAT,
        "encoder": None if limber.encoder is None else limber.encoder.name,
        "width": limber.projection.in_features,
        "n_embd": limber.projection.out_features,
        "dropout": limber.dropout,
        "layer_norm": limber.layer_norm is not None,
    }
    tensors = {name: p.detach().cpu().contiguous() for name, p in _trained(limber).named_parameters()}
    _replace(folder / WEIGHTS, save(tensors, {"format": FORMAT}))
    _replace(folder / CONFIG, (json.dumps(config, indent=1) + "\n").encode())


def _replace(path: Path, data: bytes) -> None:
    """A whole new file, or the old one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(cls: Any, folder: Path, language_model: Any, tokenizer: Any, encoder: Any) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise checks.invalid(str(path), "the file", "be JSON", str(error)) from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = repr(config.get("format")) if isinstance(config, dict) else checks.kind_of(config)
        raise checks.invalid(str(path), "format", f"be {FORMAT!r}", found)
    if config["n_embd"] != language_model.config.n_embd:
        contract = f"be of width {config['n_embd']}, as the projection"
        raise checks.invalid(str(path), "language_model", contract, str(language_model.config.n_embd))
    if encoder == "saved":
        encoder = config["encoder"]
    if isinstance(encoder, str):
        encoder = make_encoder(encoder)
    limber = cls(
        encoder, language_model, tokenizer, width=config["width"], dropout=config["dropout"],
        layer_norm=config["layer_norm"],
    )  # fmt: skip
    if encoder is not None and encoder.width != config["width"]:
        contract = f"give {config['width']} features"
        raise checks.invalid(str(path), "encoder", contract, f"{encoder.name} with {encoder.width}")
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise checks.invalid(str(folder / WEIGHTS), "the file", "be a whole safetensors file", str(error)) from error
    trained = _trained(limber)
    if set(tensors) != {name for name, _ in trained.named_parameters()}:
        found = ", ".join(sorted(tensors))
        raise checks.invalid(str(folder / WEIGHTS), "the file", "hold the projection's tensors", found)
    _fill(trained, tensors, str(folder / WEIGHTS))
    return limber
