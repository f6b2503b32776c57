"""transformers' GPT-J with its attention, MLPs and head swapped in place, and swapped back."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limber_fast import checks
from limber_fast.models.gptj_attention import rotate
from limber_fast.models.gptj_layers import FrozenLinear, Precision
from limber_fast.ops.int8_weight import quantize_int8

_OP = "patch"
ATTENTION = ("eager", "sdpa")  # implementations whose masks ours understands


@dataclass
class PatchReport:
    """What `patch` found in a model: module names, what stands there now, and why anything was left alone."""

    patched: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"patched {len(self.patched)} modules, left {len(self.skipped)} alone"]
        return "\n".join(lines + [f"  {name}: {reason}" for name, reason in self.skipped.items()])


class _Patched(nn.Module):
    """`original` stays outside the module tree: neither state_dict nor `.to` sees it twice."""

    def __init__(self, original: nn.Module, keep: bool) -> None:
        super().__init__()
        self._original = (original if keep else None,)
        self.train(original.training)


class PatchedAttention(_Patched):
    """One product for q, k and v (int8) or the model's own three (float), rotary positions in place, and SDPA."""

    def __init__(self, original: nn.Module, precision: Precision, keep: bool) -> None:
        super().__init__(original, keep)
        self.layer_idx, self.heads = original.layer_idx, original.num_attention_heads
        self.dropout, self.resid_dropout = _probability(original), original.resid_dropout
        self.cache_argument = _cache_argument(original)
        self.embed_positions = getattr(original, "embed_positions", None)  # versions that pass position_ids alone
        if precision.weights == "int8":
            self.qkv = _int8([original.q_proj, original.k_proj, original.v_proj], precision)
            self.out_proj = _int8([original.out_proj], precision)
        else:
            self.qkv = None
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                setattr(self, name, getattr(original, name))

    def forward(
        self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        batch, length, width = hidden_states.shape
        if self.qkv is None:
            x = torch.stack([proj(hidden_states) for proj in (self.q_proj, self.k_proj, self.v_proj)], 2)
        else:
            x = self.qkv(hidden_states)
        if position_embeddings is None:
            position_embeddings = self.embed_positions.to(x.device)[position_ids].chunk(2, -1)
        sin, cos = (part.float().expand(batch, -1, -1).flatten(0, 1) for part in position_embeddings)
        x = rotate(x.view(batch * length, 3, self.heads, -1), torch.complex(cos, sin))
        query, key, value = x.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)

        cache = kwargs.pop(self.cache_argument, None)
        if cache is not None:
            more = {} if self.cache_argument == "cache" else {"cache_kwargs": kwargs}
            key, value = cache.update(key, value, self.layer_idx, **more)
        if attention_mask is not None:
            attention_mask = attention_mask[..., : key.shape[2]]  # up to transformers 4 it may be longer
            if attention_mask.dtype != torch.bool:
                attention_mask = attention_mask.to(query.dtype)
        out = F.scaled_dot_product_attention(
            query, key.to(query.dtype), value.to(query.dtype), attn_mask=attention_mask,
            dropout_p=self.dropout if self.training else 0.0, is_causal=attention_mask is None and length > 1,
        )  # fmt: skip
        out = out.transpose(1, 2).reshape(batch, length, width)
        return self.resid_dropout(self.out_proj(out)), None


class PatchedMLP(_Patched):
    """fc_out(gelu_new(fc_in(x))), with the activation in one pass, or in the epilogue of the int8 product."""

    def __init__(self, original: nn.Module, precision: Precision, keep: bool) -> None:
        super().__init__(original, keep)
        int8 = precision.weights == "int8"
        self.fc_in = _int8([original.fc_in], precision) if int8 else original.fc_in
        self.fc_out = _int8([original.fc_out], precision) if int8 else original.fc_out
        self.dropout = original.dropout

    def forward(self, hidden_states: Tensor) -> Tensor:
        if isinstance(self.fc_in, FrozenLinear):
            inner = self.fc_in(hidden_states, activation="gelu_new")
        else:
            inner = F.gelu(self.fc_in(hidden_states), approximate="tanh")
        return self.dropout(self.fc_out(inner))


class PatchedHead(_Patched):
    def __init__(self, original: nn.Module, precision: Precision, keep: bool) -> None:
        super().__init__(original, keep)
        self.linear = _int8([original], precision)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.linear(hidden_states)


def _int8(layers: list[nn.Module], precision: Precision) -> FrozenLinear:
    weights, bias = [layer.weight for layer in layers], layers[0].bias
    n, k = sum(len(weight) for weight in weights), weights[0].shape[1]
    result = FrozenLinear(n, k, bias is not None, precision, "meta")
    result.weight = quantize_int8(weights)
    if bias is not None:
        result.bias = bias.detach().float()
    return result


def _probability(attention: nn.Module) -> float:
    found = getattr(attention, "attention_dropout", getattr(attention, "attn_dropout", 0.0))
    return float(getattr(found, "p", found))


def _cache_argument(attention: nn.Module) -> str:
    """The name under which this version of transformers hands over its cache; '' where it is none that we know."""
    parameters = inspect.signature(type(attention).forward).parameters
    return next((name for name in ("cache", "past_key_values", "layer_past") if name in parameters), "")


def _expected(model: nn.Module) -> Iterator[tuple[str, type[_Patched], tuple[str, ...]]]:
    """Name, replacement and linear layers of every module that a GPT-J has."""
    for name, module in model.named_modules():
        if type(module).__name__ == "GPTJBlock":
            yield f"{name}.attn", PatchedAttention, ("q_proj", "k_proj", "v_proj", "out_proj")
            yield f"{name}.mlp", PatchedMLP, ("fc_in", "fc_out")
        elif type(module).__name__ == "GPTJForCausalLM":
            yield f"{name}.lm_head".removeprefix("."), PatchedHead, ("",)


_THEIRS = {PatchedAttention: "GPTJAttention", PatchedMLP: "GPTJMLP", PatchedHead: "Linear"}


def _refusal(module: nn.Module, kind: type[_Patched], linears: tuple[str, ...], config: Any, weights: str) -> str:
    """Why a module cannot be swapped; '' where it can."""
    if isinstance(module, _Patched):
        return "it is patched already: unpatch the model first"
    if type(module).__name__ != _THEIRS[kind]:
        return f"expected {_THEIRS[kind]}, found {type(module).__name__}"
    if kind is PatchedHead and weights == "float":
        return ""
    for name in linears:
        linear = module.get_submodule(name) if hasattr(module, name) or not name else None
        if not isinstance(linear, nn.Linear):
            return f"expected {name or 'it'} to be a linear layer, found {type(linear).__name__}"
        if weights == "int8" and (type(linear) is not nn.Linear or not linear.weight.is_floating_point()):
            return f"expected {name or 'it'} to be nn.Linear in floating point, found {type(linear).__name__}"
    if kind is PatchedMLP and config.activation_function != "gelu_new":
        return f"expected the activation gelu_new, found {config.activation_function}"
    if kind is PatchedAttention:
        chosen = getattr(config, "_attn_implementation", "eager")
        if chosen not in ATTENTION:
            return f"expected attention by {' or '.join(ATTENTION)}, found {chosen}"
        if not _cache_argument(module):
            return "expected a forward method that takes a cache, found none in this version of transformers"
    return ""


def patch(
    model: nn.Module, weights: str = "int8", *, compute: str = "w8a16", outlier_threshold: float = 6.0,
    strict: bool = False, keep_original: bool = True,
) -> PatchReport:  # fmt: skip
    """Swaps the attention, MLPs and head of a transformers GPT-J for `limber_fast`'s, in place.

    transformers' own forward pass, training loop and `generate` (greedy, sampling, beams, padding, inputs_embeds, any
    cache) go on as before. Attention weights (`output_attentions`) are not kept.

    Args:
        model: a GPTJForCausalLM or GPTJModel, or any module that contains one.
        weights: 'float' uses the model's own parameters: attention without the matrix of all scores, rotary positions
            in place, gelu_new in one pass. 'int8' quantises them: frozen, a quarter of fp32's memory once the
            originals are gone, gradients to the inputs alone.
        compute, outlier_threshold: of `limber_fast.int8_linear`.
        strict: raise, with nothing changed, where a module that a GPT-J has is missing or not as expected.
        keep_original: False lets the replaced modules go, and with them `unpatch`.

    Returns: PatchReport: what was swapped, and what was left alone and why.
    Raises: ValueError under `strict`, and where no GPT-J is found at all.
    """
    checks.choice(_OP, "weights", weights, ("int8", "float"))
    checks.choice(_OP, "compute", compute, ("w8a16", "w8a8"))
    checks.not_negative(_OP, "outlier_threshold", outlier_threshold)
    if not isinstance(model, nn.Module):
        raise checks.invalid(_OP, "model", "be a transformers GPT-J", checks.kind_of(model), kind=TypeError)
    expected = list(_expected(model))
    blocks = sum(kind is PatchedMLP for _, kind, _ in expected)
    report = PatchReport()
    gptj = next((m for m in model.modules() if type(m).__name__ in ("GPTJModel", "GPTJForCausalLM")), None)
    if gptj is None or not blocks:
        raise checks.invalid(_OP, "model", "hold a GPTJModel of transformers", type(model).__name__, kind=ValueError)
    config = gptj.config
    if blocks != config.n_layer:
        report.skipped["h"] = f"expected {config.n_layer} GPTJBlocks, found {blocks}"
    chosen = []
    for name, kind, linears in expected:
        module = model.get_submodule(name)
        if reason := _refusal(module, kind, linears, config, weights):
            report.skipped[name] = reason
        elif not (kind is PatchedHead and weights == "float"):  # nothing about a float head can be bettered
            chosen.append((name, kind, module))
    if strict and report.skipped:
        raise ValueError(f"{_OP}: strict: {report}")
    for name, kind, module in chosen:
        dtype = next(module.parameters()).dtype
        precision = Precision(weights, dtype, compute, outlier_threshold)
        _replace(model, name, kind(module, precision, keep_original))
        report.patched[name] = f"{kind.__name__} ({weights}{f', {compute}' if weights == 'int8' else ''})"
    return report


def unpatch(model: nn.Module) -> list[str]:
    """Puts back every module that `patch` replaced, parameters untouched; returns their names.

    Raises: ValueError, with nothing changed, where `patch` was told not to keep them.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, _Patched)]
    for name, module in found:
        if module._original[0] is None:
            remedy = "load the model again"
            raise checks.invalid("unpatch", name, "have been patched with keep_original=True", "False", remedy)
    for name, module in found:
        tensor = next((x for x in (*module.parameters(), *module.buffers())), None)
        original = module._original[0].train(module.training)
        _replace(model, name, original if tensor is None else original.to(tensor.device))
    return [name for name, _ in found]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, module)
