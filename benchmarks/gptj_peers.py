"""The same GPT-J elsewhere: transformers in bf16, CTranslate2 and bitsandbytes in int8, and a reference in fp32."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from limber_fast import GPTJ, GPTJConfig
from limber_fast.reference.int8_linear import gelu_new

NOT_INSTALLED = "not installed: make bench-peers"


@lru_cache(maxsize=1)
def ours(layers: int) -> GPTJ:
    return GPTJ.from_config(GPTJConfig(n_layer=layers), seed=0, embedding="int8")


def transformers_model(model: GPTJ) -> Any:
    """transformers' GPT-J in bf16 with the weights that the int8 model stands for."""
    import transformers

    config = transformers.GPTJConfig(n_layer=model.config.n_layer)
    with torch.device("meta"):
        theirs = transformers.GPTJForCausalLM(config).bfloat16().eval().requires_grad_(False)
    theirs.to_empty(device="cpu")
    rotary = theirs.transformer.rotary_emb
    theirs.transformer.rotary_emb = type(rotary)(config)  # a buffer that no checkpoint holds
    width = config.n_embd
    theirs.transformer.wte.weight.data = model.embed(torch.arange(config.vocab_size))
    for block, own in zip(theirs.transformer.h, model.h, strict=True):
        qkv = own.qkv.weight.dequantize(torch.bfloat16).split(width)
        for part, weight in zip("qkv", qkv, strict=True):
            getattr(block.attn, f"{part}_proj").weight.data = weight
        block.attn.out_proj.weight.data = own.out_proj.weight.dequantize(torch.bfloat16)
        for name in ("fc_in", "fc_out"):
            layer = getattr(own, name)
            getattr(block.mlp, name).weight.data = layer.weight.dequantize(torch.bfloat16)
            getattr(block.mlp, name).bias.data = layer.bias.bfloat16()
        block.ln_1.weight.data, block.ln_1.bias.data = own.ln_1.weight, own.ln_1.bias
    theirs.transformer.ln_f.weight.data, theirs.transformer.ln_f.bias.data = model.ln_f.weight, model.ln_f.bias
    theirs.lm_head.weight.data = model.lm_head.weight.dequantize(torch.bfloat16)
    theirs.lm_head.bias.data = model.lm_head.bias.bfloat16()
    return theirs


def reference(model: GPTJ, x: Tensor) -> Tensor:
    """x [S, E], one sequence -> [S, E] after the last LayerNorm, in fp32, a dequantised block at a time."""
    config = model.config
    angle = torch.arange(len(x))[:, None] * 10000.0 ** (-torch.arange(0, config.rotary_dim, 2) / config.rotary_dim)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def rotated(x: Tensor) -> Tensor:
        even, odd = x[..., 0 : config.rotary_dim : 2], x[..., 1 : config.rotary_dim : 2]
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
        return torch.cat([turned, x[..., config.rotary_dim :]], -1)

    def block(x: Tensor, layer: Any) -> Tensor:
        h = F.layer_norm(x, (config.n_embd,), layer.ln_1.weight.float(), layer.ln_1.bias.float())
        qkv = (h @ layer.qkv.weight.dequantize().T).unflatten(-1, (3, config.n_head, config.head_dim))
        q, k, v = (part.transpose(0, 1) for part in (rotated(qkv[:, 0]), rotated(qkv[:, 1]), qkv[:, 2]))
        scores = (q @ k.transpose(1, 2)) / config.head_dim**0.5
        later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        attended = (scores.masked_fill(later, -torch.inf).softmax(-1) @ v).transpose(0, 1).flatten(1)
        inner = gelu_new(h @ layer.fc_in.weight.dequantize().T + layer.fc_in.bias)
        x = x + attended @ layer.out_proj.weight.dequantize().T
        return x + inner @ layer.fc_out.weight.dequantize().T + layer.fc_out.bias

    for layer in model.h:  # checkpoints: dequantised weights are not kept for the backward pass
        x = checkpoint(block, x, layer, use_reentrant=False)
    return F.layer_norm(x, (config.n_embd,), model.ln_f.weight.float(), model.ln_f.bias.float())


def ctranslate2_model(theirs: Any) -> tuple[Callable[[list[int], int], list[int]] | None, str]:
    """Greedy continuation of a prompt by CTranslate2 in int8, or None and the reason why not."""
    if find_spec("ctranslate2") is None:
        return None, NOT_INSTALLED
    import ctranslate2

    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        word_per_id(theirs.config.vocab_size).save_pretrained(folder)
        target = Path(folder) / "int8"
        ctranslate2.converters.TransformersConverter(folder, low_cpu_mem_usage=True).convert(
            target, quantization="int8"
        )
        generator = ctranslate2.Generator(
            str(target), device="cpu", compute_type="int8", intra_threads=torch.get_num_threads(), inter_threads=1
        )

    def generate(prompt: list[int], new: int) -> list[int]:
        (result,) = generator.generate_batch(
            [[f"w{token}" for token in prompt]], max_length=new, min_length=new, include_prompt_in_result=False,
            sampling_topk=1,
        )  # fmt: skip
        return result.sequences_ids[0]

    return generate, ""


def word_per_id(vocabulary: int) -> Any:
    """A tokenizer of transformers whose text is "w17 w4"."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(vocabulary)}
    ends = dict.fromkeys(("unk_token", "bos_token", "eos_token"), "w50256")  # CTranslate2 asks for all of them
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w50256"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)


def bitsandbytes_model(model: GPTJ) -> tuple[Any | None, str]:
    """transformers' GPT-J with its linear maps in bitsandbytes' int8, or None and the reason why not."""
    if find_spec("bitsandbytes") is None:
        return None, NOT_INSTALLED
    import bitsandbytes as bnb

    theirs = transformers_model(model)
    for name, linear in list(theirs.named_modules()):
        if isinstance(linear, torch.nn.Linear) and name != "lm_head":
            n, k = linear.weight.shape
            swapped = bnb.nn.Linear8bitLt(k, n, linear.bias is not None, has_fp16_weights=False, threshold=6.0)
            swapped.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
            if linear.bias is not None:
                swapped.bias = torch.nn.Parameter(linear.bias.data, requires_grad=False)
            path, _, last = name.rpartition(".")
            setattr(theirs.get_submodule(path), last, swapped.to("cpu"))
    return theirs, ""
