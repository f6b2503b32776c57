"""Sizes of a GPT-J, as its config.json names them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from limber_fast import checks

# What a config.json may say beside the sizes, and the one value that is GPT-J: anything else is another model.
FIXED = {"model_type": "gptj", "activation_function": "gelu_new", "tie_word_embeddings": False}


@dataclass(frozen=True)
class GPTJConfig:
    """The sizes of GPT-J-6B by default; names and meanings as in transformers.

    Attributes:
        vocab_size: V. n_positions: longest sequence. n_embd: E, the width. n_layer: blocks. n_head: H; E / H is the
            width of a head. rotary_dim: leading dimensions of a head that are rotated, in neighbouring pairs.
        n_inner: width of the MLP; None for 4 E.
        layer_norm_epsilon: of every LayerNorm. initializer_range: standard deviation of random weights.
        eos_token_id: one id or several that end a text; None for none.
        adapter_width: of MAGMA's adapters behind every MLP (E / 4 there); None for none.

    Raises: ValueError where a size is impossible.
    """

    vocab_size: int = 50400
    n_positions: int = 2048
    n_embd: int = 4096
    n_layer: int = 28
    n_head: int = 16
    rotary_dim: int = 64
    n_inner: int | None = None
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256
    adapter_width: int | None = None

    def __post_init__(self) -> None:
        op = "GPTJConfig"
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "rotary_dim"):
            checks.size(op, name, getattr(self, name))
        for name in ("n_inner", "adapter_width"):
            if getattr(self, name) is not None:
                checks.size(op, name, getattr(self, name))
        if self.n_embd % self.n_head:
            raise checks.invalid(op, "n_embd", f"be a multiple of n_head = {self.n_head}", repr(self.n_embd))
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            contract = f"be even and at most {self.head_dim}, the width of a head"
            raise checks.invalid(op, "rotary_dim", contract, repr(self.rotary_dim))
        for name in ("layer_norm_epsilon", "initializer_range"):
            checks.not_negative(op, name, getattr(self, name))

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def inner(self) -> int:
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        found = self.eos_token_id
        return () if found is None else (found,) if isinstance(found, int) else found

    @classmethod
    def from_dict(cls, found: Mapping[str, Any], source: str = "config.json") -> GPTJConfig:
        """Of a parsed config.json; keys that do not change what a frozen model computes are ignored.

        Raises: ValueError where it is not GPT-J's, or a size is missing or impossible.
        """
        if not isinstance(found, Mapping):
            raise checks.invalid(source, "the config", "be an object", type(found).__name__)
        for name, expected in FIXED.items():
            value = found.get(name, None if name == "model_type" else expected)
            if value != expected:
                raise checks.invalid(source, name, f"be {expected!r}", repr(value), "only GPT-J can be loaded")
        sizes = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "rotary_dim")
        for name in sizes:
            if name not in found:
                raise checks.invalid(source, name, "be given", "no such key")
        known = {field.name for field in fields(cls)}
        try:
            return cls(**{name: value for name, value in found.items() if name in known})
        except (ValueError, TypeError) as error:
            raise type(error)(f"{source}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        return {"architectures": ["GPTJForCausalLM"], **FIXED, **asdict(self)}
