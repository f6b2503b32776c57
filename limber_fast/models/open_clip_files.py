"""Weights of an open_clip model from a file: open_clip's own, or OpenAI's TorchScript archives."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from limber_fast import checks
from limber_fast.files import broken, fill, load_state, reason

# What OpenAI's archives hold beside the weights.
_OPENAI = ("input_resolution", "context_length", "vocab_size")
_NO_WEIGHTS = ("position_ids", "attn_mask", "num_batches_tracked")


@contextmanager
def quiet() -> Iterator[None]:
    """Without open_clip's warning that a model is random, which it is before its weights are copied from a file."""

    def other(record: logging.LogRecord) -> bool:
        return "initialized randomly" not in record.getMessage()

    logging.getLogger().addFilter(other)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(other)


def read(path: str) -> tuple[dict[str, Tensor], bool]:
    """(the state dict, whether it is OpenAI's), the latter without those sizes.

    Raises: ValueError with one line for a file that is none.
    """
    found = load_state(path)
    found = found.get("state_dict", found)  # as open_clip's training stores it
    if not isinstance(found, Mapping) or not all(isinstance(x, Tensor) for x in found.values()) or not found:
        raise checks.invalid(path, "the file", "hold a state dict", _content(found))
    found = {str(name).removeprefix("module."): tensor for name, tensor in found.items()}
    openai = all(name in found for name in _OPENAI)
    return {name: tensor for name, tensor in found.items() if not openai or name not in _OPENAI}, openai


def _content(found: Any) -> str:
    if not isinstance(found, Mapping):
        return checks.kind_of(found)
    return next((f"{name!r}: {checks.kind_of(x)}" for name, x in found.items() if not isinstance(x, Tensor)), "nothing")


def load(open_clip: Any, model: nn.Module, found: dict[str, Tensor], path: str, name: str, openai: bool) -> None:
    """Copies `found` into `model`, other names and position embeddings of another size converted by open_clip.

    Raises: ValueError with one line where it is not this model's.
    """
    factory = open_clip.factory
    try:
        found = factory.convert_state_dict(model, found)
        if "positional_embedding" in found and not hasattr(model, "positional_embedding"):
            found = factory.convert_to_custom_text_state_dict(found)
        for scalar in ("logit_scale", "logit_bias"):
            if scalar in found and getattr(model, scalar, None) is not None:
                found[scalar] = found[scalar].reshape(getattr(model, scalar).shape)
        if getattr(model, "logit_bias", None) is not None:  # models from before there was one
            found.setdefault("logit_bias", model.logit_bias.new_zeros(model.logit_bias.shape))
        factory.resize_pos_embed(found, model)
        factory.resize_text_pos_embed(found, model)
    except (*broken(), AssertionError) as error:
        raise checks.invalid(path, "the file", f"hold the weights of {name}", reason(error)) from error
    known = model.state_dict()
    extra = [x for x in found if x not in known and not x.endswith(_NO_WEIGHTS)]
    if extra and not openai:  # OpenAI's archives may hold more tensors than their state
        raise checks.invalid(path, "the file", f"hold the weights of {name} alone", repr(extra[0]))
    fill(model, found, path, optional="num_batches_tracked")
