"""A Limber on disk: the released proj.ckpt, and a folder of its own."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from torch import nn

from limber_fast import checks
from limber_fast.files import fill, load_state, replace
from limber_fast.models.encoders import encoder as make_encoder

FORMAT = "limber_fast.Limber/3"
CONFIG = "limber.json"
ENCODER = "encoder"  # its part in the file of tensors


def load_projection(projection: nn.Linear, path: Path) -> None:
    """Fills `projection` from a state dict with exactly the keys weight and bias, or leaves it as it is and raises."""
    found = load_state(path)
    if set(found) != {"weight", "bias"}:
        keys = ", ".join(sorted(map(str, found))) or "nothing"
        raise checks.invalid(str(path), "the file", "hold weight and bias", keys)
    fill(projection, found, str(path))


def _parts(limber: Any, adapters: nn.ModuleDict) -> nn.ModuleDict:
    """What is stored but for the encoder: what was trained, or can be."""
    parts = {"projection": limber.projection, "adapters": adapters}
    if limber.layer_norm is not None:
        parts["layer_norm"] = limber.layer_norm
    return nn.ModuleDict(parts)


def save(limber: Any, folder: Path) -> None:
    """limber.json names the one file of tensors and replaces an older one last, in a single rename: whatever fails
    before leaves the folder as it was."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    old = _file_of(folder)
    encoder = limber.encoder
    own = encoder is not None and (encoder.own or any(p.requires_grad for p in encoder.parameters()))
    data = folder / f"limber-{uuid.uuid4().hex}.safetensors"
    config = {
        "format": FORMAT,
        "file": data.name,
        "encoder": None if encoder is None else {
            "name": encoder.name, "weights": None if own else encoder.weights, "seed": encoder.seed,
        },
        "own_encoder": own,
        "width": limber.projection.in_features,
        "n_embd": limber.projection.out_features,
        "dropout": float(limber.dropout),
        "layer_norm": limber.layer_norm is not None,
        "adapter_width": limber.language_model.config.adapter_width or 0,
    }
    tensors = dict(_parts(limber, limber.language_model.adapters).named_parameters())
    if own:
        tensors |= {f"{ENCODER}.{name}": x for name, x in encoder.trunk.state_dict().items()}
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    try:
        replace(data, save(tensors, {"format": FORMAT}))
        replace(folder / CONFIG, json.dumps(config, indent=1) + "\n")
    except BaseException:
        data.unlink(missing_ok=True)
        raise
    if old is not None and old != data.name:
        (folder / old).unlink(missing_ok=True)


def _file_of(folder: Path) -> str | None:
    """The file of tensors of a Limber that is there already."""
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["file"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return found if isinstance(found, str) and found == os.path.basename(found) else None


def load(cls: Any, folder: Path, language_model: Any, tokenizer: Any, encoder: Any) -> Any:
    config = _read_config(folder)
    path = folder / CONFIG
    if config["n_embd"] != language_model.config.n_embd:
        contract = f"be of width {config['n_embd']}, as the projection"
        raise checks.invalid(str(path), "language_model", contract, str(language_model.config.n_embd))
    given = language_model.config.adapter_width
    if given is not None and given != config["adapter_width"]:
        contract = f"have none but this Limber's adapters, of width {config['adapter_width']}"
        raise checks.invalid(str(path), "language_model", contract, f"adapters of width {given}")
    data = folder / config["file"]
    tensors = load_state(data)
    saved = encoder == "saved"
    if saved:
        encoder = config.get("encoder") and make_encoder(**config["encoder"])
        if config["own_encoder"]:
            fill(encoder.trunk, tensors, str(data), prefix=f"{ENCODER}.")
            encoder.own = True
    elif isinstance(encoder, str):
        encoder = make_encoder(encoder)
    if encoder is not None and encoder.width != config["width"]:
        contract = f"give {config['width']} features"
        raise checks.invalid(str(path), "encoder", contract, f"{encoder.name} with {encoder.width}")
    limber = cls(
        encoder, language_model, tokenizer, width=config["width"], dropout=config["dropout"],
        layer_norm=config["layer_norm"],
    )  # fmt: skip
    new = given is None and config["adapter_width"] > 0
    adapters = language_model.new_adapters(config["adapter_width"]) if new else language_model.adapters
    parts = _parts(limber, adapters)
    found = {name for name in tensors if not name.startswith(f"{ENCODER}.")}
    expected = {name for name, _ in parts.named_parameters()}
    if extra := sorted(found - expected):
        raise checks.invalid(str(data), "the file", "hold this Limber's tensors alone", repr(extra[0]))
    fill(parts, tensors, str(data))
    if new:
        language_model.attach_adapters(adapters)
    return limber


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise checks.invalid(str(path), "the file", "be JSON", str(error)) from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = repr(config.get("format")) if isinstance(config, dict) else checks.kind_of(config)
        raise checks.invalid(str(path), "format", f"be {FORMAT!r}", found)
    kinds = {"width": int, "n_embd": int, "adapter_width": int, "dropout": float, "layer_norm": bool,
             "own_encoder": bool, "file": str}  # fmt: skip
    for name, kind in kinds.items():
        if type(config.get(name)) is not kind:
            raise checks.invalid(str(path), name, f"be {kind.__name__}", repr(config.get(name)))
    if _file_of(folder) is None:
        raise checks.invalid(str(path), "file", "be the name of a file in the same folder", repr(config["file"]))
    return config
