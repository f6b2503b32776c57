"""MAGMA's checkpoint as a Limber: encoder, projection and LayerNorm, and GPT-J with adapters, quantised on the way."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limber_fast import checks
from limber_fast.files import broken, fill, reason
from limber_fast.models.encoders import ImageEncoder
from limber_fast.models.gptj import GPTJ
from limber_fast.models.gptj_config import GPTJConfig
from limber_fast.models.gptj_weights import Filling, full_name, shapes

PREFIX, LANGUAGE_MODEL = "image_prefix.", "lm."
# The same tensors under a second name, masks, and BatchNorm's step counters.
_KNOWN_EXTRAS = re.compile(
    r"(word_embedding\.|transformer\.).*|lm\.transformer\.h\.\d+\.attn\.attention\.(bias|masked_bias)"
    r"|image_prefix\.enc\..*num_batches_tracked"
)
_RENAMED = (
    (re.compile(r"\.attn\.([qkv]|out)_proj\."), r".attn.attention.\1_proj."),
    (re.compile(r"\.mlp\.fc_in\."), ".mlp.0.c_fc."),
    (re.compile(r"\.mlp\.fc_out\."), ".mlp.0.c_proj."),
    (re.compile(r"\.mlp\.adapter\."), ".mlp.1.adapter."),
)


def magma_name(name: str) -> str:
    """What MAGMA calls a tensor of GPT-J: transformer.h.0.mlp.fc_in.weight -> lm.transformer.h.0.mlp.0.c_fc.weight."""
    name = full_name(name)
    for ours, theirs in _RENAMED:
        name = ours.sub(theirs, name)
    return LANGUAGE_MODEL + name


def read(path: Path) -> Mapping[str, Any]:
    """The state dict, memory-mapped where the file allows it; alone, or as DeepSpeed stores it under 'module'."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except broken() as error:
        contract = "be a whole file of tensors alone, as torch.save writes it"
        raise checks.invalid(str(path), "the file", contract, reason(error)) from error
    if isinstance(found, dict):
        found = found.get("module", found)
    if not isinstance(found, dict):
        raise checks.invalid(str(path), "the file", "hold a state dict", checks.kind_of(found))
    return found


def load_language_model(path: Path, found: Mapping[str, Any], config: GPTJConfig, device: Any, how: dict) -> GPTJ:
    """GPT-J with adapters, matrix by matrix. MAGMA reads fewer ids than its head has rows: embeddings that it lacks are
    zeros."""
    filling = Filling(GPTJ(config, device="meta", **how), str(path), device, shown=magma_name)
    ours = {magma_name(name): name for name in filling.expected}
    for name in ours:  # all names and shapes before anything is quantised
        tensor = found.get(name)
        if tensor is not None and not isinstance(tensor, Tensor):
            raise checks.invalid(str(path), f"tensor {name!r}", "be a tensor", checks.kind_of(tensor))
        if tensor is not None and not name.endswith(".wte.weight"):
            filling.check_shape(ours[name], tensor.shape)
    filling.check_names(ours[name] for name in found if name in ours)
    rows, least = config.vocab_size, max(config.eos_token_ids, default=0) + 1
    words = found[magma_name("wte.weight")]
    if words.ndim != 2 or words.shape[1] != config.n_embd or not least <= len(words) <= rows:
        contract = f"be [{least} to {rows}, {config.n_embd}]"
        raise checks.invalid(str(path), f"tensor {magma_name('wte.weight')!r}", contract, checks.shape_of(words))
    for theirs, name in ours.items():
        tensor = found[theirs]
        filling.add(name, F.pad(tensor, (0, 0, 0, rows - len(tensor))) if name.endswith(".wte.weight") else tensor)
    return filling.done()


def load(
    cls: Any, path: Path, tokenizer: Any, encoder: ImageEncoder, config: GPTJConfig, device: Any, how: dict
) -> Any:
    """A Limber of everything in the file, or one error before any of it is used."""
    found = read(path)
    projection = nn.Linear(encoder.width, config.n_embd)
    norm = nn.LayerNorm(config.n_embd)
    parts = {"enc.": encoder.trunk, "proj.": projection, "ln.": norm}
    known = {
        f"{PREFIX}{start}{name}" for start, part in parts.items() for name in part.state_dict()
    } | {magma_name(name) for name in shapes(config)}  # fmt: skip
    extra = sorted(str(x) for x in found if x not in known and not _KNOWN_EXTRAS.fullmatch(str(x)))
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise checks.invalid(str(path), "the checkpoint", "hold MAGMA's tensors alone", f"{extra[0]!r}{more}")
    for start, part in parts.items():
        fill(part, found, str(path), prefix=PREFIX + start, optional="num_batches_tracked")
    encoder.own = True
    language_model = load_language_model(path, found, config, device, how)
    limber = cls(encoder, language_model, tokenizer, layer_norm=True)
    limber.projection, limber.layer_norm = projection, norm
    return limber if device is None else limber.to(device)
