"""Where GPT-J's weights come from: a checkpoint's tensors by name, quantised on the way, or a random generator."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from limber_fast import checks
from limber_fast.models.gptj_config import GPTJConfig
from limber_fast.ops.int8_weight import BLOCK, Int8Weight, quantize_int8, rounded_rows

# Masks and constants that some versions stored; they hold nothing that was learnt.
OBSOLETE = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias|embed_positions)|transformer\.rotary_emb\..*")
# bitsandbytes' int8 layers: integers under the weight's name, 127 times the scale of each row under SCB.
BNB_SCALES, BNB_FORMAT = ".SCB", ".weight_format"
_ROWS = 1024  # of integers whose sums are taken at a time
_UNIFORM = math.sqrt(127 * 128 / 3)  # the standard deviation of uniform integers within -127..127


def sources(config: GPTJConfig) -> dict[str, tuple[str, ...]]:
    """Of each tensor or int8 matrix of a `GPTJ`, the checkpoint tensors that are stacked in it."""
    names = {"wte": ("transformer.wte.weight",)}
    for i in range(config.n_layer):
        theirs = f"transformer.h.{i}"
        names[f"h.{i}.ln_1.weight"] = (f"{theirs}.ln_1.weight",)
        names[f"h.{i}.ln_1.bias"] = (f"{theirs}.ln_1.bias",)
        names[f"h.{i}.qkv.weight"] = tuple(f"{theirs}.attn.{x}_proj.weight" for x in "qkv")
        names[f"h.{i}.out_proj.weight"] = (f"{theirs}.attn.out_proj.weight",)
        for layer in ("fc_in", "fc_out"):
            for kind in ("weight", "bias"):
                names[f"h.{i}.{layer}.{kind}"] = (f"{theirs}.mlp.{layer}.{kind}",)
        if config.adapter_width is not None:
            for layer, number in (("down", 0), ("up", 2)):
                for kind in ("weight", "bias"):
                    names[f"h.{i}.adapter.{layer}.{kind}"] = (f"{theirs}.mlp.adapter.{number}.{kind}",)
    for layer in ("ln_f", "lm_head"):
        for kind in ("weight", "bias"):
            names[f"{layer}.{kind}"] = (f"{'transformer.' * (layer == 'ln_f')}{layer}.{kind}",)
    return names


def shapes(config: GPTJConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a checkpoint, by name."""
    width, inner, vocabulary = config.n_embd, config.inner, config.vocab_size
    ends = {
        "wte.weight": (vocabulary, width), "lm_head.weight": (vocabulary, width), "lm_head.bias": (vocabulary,),
        "fc_in.weight": (inner, width), "fc_in.bias": (inner,), "fc_out.weight": (width, inner),
        "proj.weight": (width, width), "adapter.0.weight": (config.adapter_width, width),
        "adapter.0.bias": (config.adapter_width,), "adapter.2.weight": (width, config.adapter_width),
    }  # fmt: skip
    return {
        name: next((shape for end, shape in ends.items() if name.endswith(end)), (width,))
        for parts in sources(config).values() for name in parts
    }  # fmt: skip


def full_name(name: str) -> str:
    """Of a GPTJModel saved without its head the names lack the prefix."""
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def put(owner: nn.Module, name: str, value: Tensor | Int8Weight) -> None:
    """Sets a buffer, an int8 matrix, or a frozen parameter."""
    if isinstance(getattr(owner, name), nn.Parameter):
        value = nn.Parameter(value, requires_grad=False)
    setattr(owner, name, value)


def small_normal_(x: Tensor, generator: torch.Generator) -> Tensor:
    """What MAGMA's adapters begin with: a standard deviation of 1e-3, cut at twice that."""
    return x.normal_(0, 1e-3, generator=generator).clamp_(-2e-3, 2e-3)


class Filling:
    """Fills a GPTJ built on meta, tensor by tensor in any order, keeping only what a matrix still waits for.

    Args: shown: from a tensor's name to the one it has in the file, for complaints.
    """

    def __init__(
        self, model: nn.Module, source: str, device: torch.device | str | None = None,
        shown: Callable[[str], str] = str,
    ) -> None:  # fmt: skip
        self.model, self.source, self.device, self.shown = model, source, device, shown
        self.expected, self.groups = shapes(model.config), sources(model.config)
        self.target = {name: target for target, parts in self.groups.items() for name in parts}
        self.pending: dict[str, Tensor] = {}
        self.missing = set(self.expected)

    def check_names(self, found: Iterable[str]) -> None:
        """Before anything is read: exactly GPT-J's tensors, but for what nobody needs."""
        found = {name for name in found if not OBSOLETE.fullmatch(name) and not name.endswith((BNB_SCALES, BNB_FORMAT))}
        if missing := sorted(self.missing - found):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            name, shape = self.shown(missing[0]), self.expected[missing[0]]
            raise checks.invalid(self.source, f"tensor {name!r}", f"be {shape}", f"no tensor of that name{more}")
        if extra := sorted(found - set(self.expected)):
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            raise checks.invalid(self.source, "the checkpoint", "hold GPT-J's tensors alone", f"{extra[0]!r}{more}")

    def check_shape(self, name: str, shape: Iterable[int]) -> None:
        if name in self.expected and tuple(shape) != self.expected[name]:
            expected = f"be {self.expected[name]}"
            raise checks.invalid(self.source, f"tensor {self.shown(name)!r}", expected, f"shape {tuple(shape)}")

    def add(self, name: str, tensor: Tensor, scales: Tensor | None = None) -> None:
        """One tensor of the checkpoint; with `scales`, of bitsandbytes' int8."""
        if name not in self.expected:
            return
        self.check_shape(name, tensor.shape)
        if scales is not None:
            tensor = tensor.float() * (scales.float() / 127)[:, None]
        elif not tensor.is_floating_point():
            raise checks.invalid(self.source, f"tensor {self.shown(name)!r}", "be floating point", str(tensor.dtype))
        self.pending[name] = tensor
        target = self.target[name]
        if all(part in self.pending for part in self.groups[target]):
            parts = [self.pending.pop(part) for part in self.groups[target]]
            self.missing.difference_update(self.groups[target])
            self._fill(target, parts)

    def _fill(self, target: str, parts: list[Tensor]) -> None:
        path, _, name = target.rpartition(".")
        owner = self.model.get_submodule(path)
        held = getattr(owner, name)
        if isinstance(held, Int8Weight):
            value = self._rounded(target, quantize_int8, [part.to(self.device) for part in parts])
        elif held.dtype == torch.int8:
            value, scales = self._rounded(target, rounded_rows, "GPTJ", parts[0].to(self.device))
            put(owner, f"{name}_scales", scales)
        else:
            value = torch.cat([part.detach().to(self.device, held.dtype) for part in parts])
        put(owner, name, value)

    def _rounded(self, target: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except ValueError as error:  # NaN or Inf
            raise ValueError(f"{self.source}: {self.shown(self.groups[target][0])!r}: {error}") from error

    def done(self) -> nn.Module:
        self.check_names(set(self.expected) - self.missing)
        return self.model


def randomise(model: nn.Module, seed: int, device: torch.device | str | None = None) -> None:
    """Weights of standard deviation `initializer_range`, biases of 0 and LayerNorms of 1, tensor by tensor.

    In floating point they are normal. In int8 the integers are drawn themselves, uniform: GPT-J-6B takes seconds, and
    no floating-point matrix is ever held.
    """
    generator = torch.Generator(device or "cpu").manual_seed(seed)
    std = model.config.initializer_range
    for target in sources(model.config):
        path, _, name = target.rpartition(".")
        owner = model.get_submodule(path)
        held = getattr(owner, name)
        if isinstance(held, Int8Weight):
            value = _random_int8(*held.shape, std, generator)
        elif held.dtype == torch.int8:
            value = torch.empty_like(held, device=generator.device).random_(-127, 128, generator=generator)
            put(owner, f"{name}_scales", torch.full((len(held),), std / _UNIFORM, device=generator.device))
        else:
            value = torch.empty_like(held, device=generator.device)
            if isinstance(held, nn.Parameter):
                small_normal_(value, generator)
            elif value.ndim == 2:
                value.normal_(0, std, generator=generator)
            else:
                value.fill_(name == "weight")
        put(owner, name, value)


def _random_int8(n: int, k: int, std: float, generator: torch.Generator) -> Int8Weight:
    weight = Int8Weight(n, k, generator.device)
    weight.packed.view(-1).view(torch.int64).random_(-(2**63), None, generator=generator)
    weight.packed.clamp_(min=-127)
    if weight.packed.ndim == 2:  # on a GPU
        weight.packed[:, k:] = 0
    else:
        weight.packed[-1, :, (n - 1) % BLOCK + 1 :] = 0  # beyond N, and beyond K
        weight.packed[:, k // 4 : k // 4 + 1, :, k % 4 :] = 0
        weight.packed[:, k // 4 + 1 :] = 0
    weight.column_sums.zero_()
    for at, part in enumerate(weight.integers().split(_ROWS)):  # fp32 holds these sums exactly, and twice as fast
        q = part.float()
        weight.row_sums[at * _ROWS : at * _ROWS + len(q)] = q.sum(1)
        weight.column_sums += q.sum(0).int()
    weight.scales.fill_(std / _UNIFORM)
    return weight
