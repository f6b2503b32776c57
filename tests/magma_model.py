"""MAGMA in plain PyTorch, with the names of its checkpoint's tensors as its modules' names."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Keys `q_proj.weight` ... under `attention`, and the mask that the checkpoint stores."""

    def __init__(self, width: int, heads: int, rotary: int):
        super().__init__()
        self.heads, self.rotary = heads, rotary
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(width, width, bias=False))
        self.register_buffer("bias", torch.ones(1, 1, 8, 8).tril().bool())
        self.register_buffer("masked_bias", torch.tensor(-1e9))

    def forward(self, x: Tensor) -> Tensor:
        length, width = x.shape
        q, k, v = (p(x).view(length, self.heads, -1).transpose(0, 1) for p in (self.q_proj, self.k_proj, self.v_proj))
        scores = self._turn(q) @ self._turn(k).mT / math.sqrt(width // self.heads)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(later, -torch.inf).softmax(-1) @ v
        return self.out_proj(mixed.transpose(0, 1).reshape(length, width))

    def _turn(self, x: Tensor) -> Tensor:
        turned = x.clone()
        for pair in range(self.rotary // 2):
            angle = torch.arange(x.shape[1], dtype=x.dtype) * 10000 ** (-2 * pair / self.rotary)
            even, odd = x[..., 2 * pair], x[..., 2 * pair + 1]
            turned[..., 2 * pair] = even * angle.cos() - odd * angle.sin()
            turned[..., 2 * pair + 1] = odd * angle.cos() + even * angle.sin()
        return turned


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        return self.c_proj(0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


class Bottleneck(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.adapter = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter(x) + x


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, rotary: int, inner: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"attention": Attention(width, heads, rotary)})
        self.mlp = nn.Sequential(Mlp(width), Bottleneck(width, inner))

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln_1(x)
        return x + self.attn["attention"](h) + self.mlp(h)


class Magma(nn.Module):
    """`image_prefix` over a given encoder, and `lm`; twice registered parts as MAGMA registers them."""

    def __init__(self, encoder: nn.Module, features: int, *, width: int, layers: int, heads: int, rotary: int,
                 inner: int, words: int, vocabulary: int):  # fmt: skip
        super().__init__()
        self.lm = nn.Module()
        self.lm.transformer = nn.ModuleDict({
            "wte": nn.Embedding(words, width),
            "h": nn.ModuleList(Layer(width, heads, rotary, inner) for _ in range(layers)),
            "ln_f": nn.LayerNorm(width),
        })  # fmt: skip
        self.lm.lm_head = nn.Linear(width, vocabulary)
        self.word_embedding, self.transformer = self.lm.transformer["wte"], self.lm.transformer["h"]
        self.image_prefix = nn.ModuleDict({
            "enc": encoder, "proj": nn.Linear(features, width), "ln": nn.LayerNorm(width)
        })  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        for name, p in self.named_parameters():
            if not name.startswith("image_prefix.enc"):
                p.requires_grad_(False)
                spread = 0.3 if "adapter" in name or p.ndim == 1 else 1.3 * p.shape[1] ** -0.5
                p.copy_(spread * torch.randn(p.shape, generator=generator) + ("ln" in name and "weight" in name))

    def soft_prompts(self, pixels: Tensor) -> Tensor:
        prefix = self.image_prefix
        return prefix["ln"](prefix["proj"](prefix["enc"](pixels).flatten(2).mT))

    def logits(self, x: Tensor) -> Tensor:
        """x [S, E] of one sequence."""
        for layer in self.lm.transformer["h"]:
            x = layer(x)
        return self.lm.lm_head(self.lm.transformer["ln_f"](x))


def released():
    """Name and shape of every tensor of MAGMA's released checkpoint: CLIP's RN50x16 without its attention pooling, map
    and LayerNorm, GPT-J-6B with adapters behind its MLPs, 50258 ids. GPT-J's masks, and what MAGMA registers twice."""
    found = {}

    def put(name, *shape, bias=False):
        found[f"{name}.weight"] = shape
        if bias:
            found[f"{name}.bias"] = shape[:1]

    def convolution(name, norm, out, into, size):
        put(name, out, into, size, size)
        put(norm, out, bias=True)
        found.update({f"{norm}.running_mean": (out,), f"{norm}.running_var": (out,), f"{norm}.num_batches_tracked": ()})

    enc, into = "image_prefix.enc", 96
    for i, sizes in enumerate(((48, 3), (48, 48), (96, 48)), 1):
        convolution(f"{enc}.conv{i}", f"{enc}.bn{i}", *sizes, 3)
    for i, (blocks, width) in enumerate(((6, 96), (8, 192), (18, 384), (8, 768)), 1):
        for j in range(blocks):
            at = f"{enc}.layer{i}.{j}"
            for k, (*sizes, size) in enumerate(((width, into, 1), (width, width, 3), (4 * width, width, 1)), 1):
                convolution(f"{at}.conv{k}", f"{at}.bn{k}", *sizes, size)
            if j == 0:
                convolution(f"{at}.downsample.0", f"{at}.downsample.1", 4 * width, into, 1)
            into = 4 * width
    put("image_prefix.proj", 4096, 3072, bias=True)
    put("image_prefix.ln", 4096, bias=True)
    put("lm.transformer.wte", 50258, 4096)
    put("lm.transformer.ln_f", 4096, bias=True)
    put("lm.lm_head", 50400, 4096, bias=True)
    for i in range(28):
        at = f"lm.transformer.h.{i}"
        put(f"{at}.ln_1", 4096, bias=True)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            put(f"{at}.attn.attention.{part}", 4096, 4096)
        found.update({f"{at}.attn.attention.bias": (1, 1, 2048, 2048), f"{at}.attn.attention.masked_bias": ()})
        put(f"{at}.mlp.0.c_fc", 16384, 4096, bias=True)
        put(f"{at}.mlp.0.c_proj", 4096, 16384, bias=True)
        put(f"{at}.mlp.1.adapter.0", 1024, 4096, bias=True)
        put(f"{at}.mlp.1.adapter.2", 4096, 1024, bias=True)
    again = {name.removeprefix("lm."): x for name, x in found.items() if name.startswith("lm.transformer.h.")}
    return found | again | {"word_embedding.weight": found["lm.transformer.wte.weight"]}
