"""GPT-J-6B's layers at full width: decode, prefill and a training step to the inputs, against transformers in bf16.

Six layers and the head are paired with transformers (`eager`, and `sdpa`), and with CTranslate2 and bitsandbytes where
they are installed; all hold the same weights. The whole model, 28 layers, runs alone. Decode rows include attention
over the prompt and the choice of the token, and stream every weight from memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import cases
import gptj_peers
import pytest
import torch
from comparison import Trial, Workload, available_bytes
from torch import Tensor

from limber_fast import GPTJ

PROMPT, NEW, CAPTIONS, CAPTION, SOFT_PROMPTS = 256, 32, 8, 160, 144
# Of logits and gradients after six blocks of bf16 activations, rounded to 8 bits by row under w8a8.
TOLERANCE = {"w8a16": 4e-2, "w8a8": 8e-2}
BASELINE_TOLERANCE = 1e-1
WHOLE, PAIRED = 28, 6


@lru_cache(maxsize=1)
def peers(layers: int) -> dict[str, Any]:
    return {"transformers": gptj_peers.transformers_model(gptj_peers.ours(layers))}


@lru_cache(maxsize=1)
def ids(batch: int, length: int) -> Tensor:
    return torch.randint(50257, (batch, length), generator=torch.Generator().manual_seed(2))


@lru_cache(maxsize=1)
def expected_logits(layers: int) -> Tensor:
    """[2, V] fp32 of the first sequence: at the prompt's last token, and at the token after it."""
    model = gptj_peers.ours(layers)
    with torch.no_grad():
        hidden = gptj_peers.reference(model, model.embed(ids(16, PROMPT + 1)[0]).float())[-2:]
        return hidden @ model.lm_head.weight.dequantize().T + model.lm_head.bias


def packed_bytes(model: GPTJ) -> int:
    return sum(x.nbytes for name, x in model.named_buffers() if name.endswith("packed"))


def block_weights(model: GPTJ) -> int:
    return packed_bytes(model) - model.lm_head.weight.packed.nbytes


def block_products(model: GPTJ, tokens: int, asked: int) -> float:
    """Multiply-adds of the blocks; behind its attention the last one computes the asked tokens alone."""
    last = model.h[-1]
    rest = sum(getattr(last, name).weight.packed.nbytes for name in ("out_proj", "fc_in", "fc_out"))
    return block_weights(model) * float(tokens) - rest * float(tokens - asked)


def _implementation(theirs: Any, name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def using(function: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            theirs.set_attn_implementation(name)
            with torch.inference_mode():
                return function()

        return run

    return using


def prepare_inference(workload: Workload) -> Trial:
    layers, batch = workload.shape["L"], workload.shape["B"]
    compute = "w8a8" if workload.options.get("w8a8") else "w8a16"
    decode = workload.group == "decode"
    model, tokens = gptj_peers.ours(layers), ids(16, PROMPT + 1)[:batch]
    prompt, following = tokens[:, :PROMPT], tokens[:, PROMPT:]
    model.compute = compute
    cache = model.new_cache(batch, PROMPT + 1)
    if decode:
        with torch.inference_mode():
            model(prompt, cache=cache)

    @torch.inference_mode()
    def ours() -> tuple[Tensor, Tensor]:
        model.compute = compute
        cache.truncate([PROMPT if decode else 0] * batch)
        logits = model(following if decode else prompt, cache=cache, logits_to_keep=1).logits[:, -1]
        return logits, logits.argmax(-1)

    baselines: dict[str, Callable[[], Any]] = {}
    skipped: dict[str, str] = {}
    if layers == PAIRED:
        theirs = peers(layers)["transformers"]
        for name in ("eager", "sdpa"):
            using = _implementation(theirs, name)
            baselines[name] = using(_decoding(theirs, prompt, following) if decode else _prefilling(theirs, prompt))
    true = expected_logits(layers)[1 if decode else 0] if layers == PAIRED else None

    def errors(result: tuple[Tensor, Tensor]) -> dict[str, float]:
        if true is None:
            return {"finite": 0.0 if bool(result[0].isfinite().all()) else 1.0}
        return {"logits": cases.errors(result[0][0], true)[0]}

    digits = 1 if compute == "w8a8" else 2
    head, kv = model.lm_head.weight.packed.nbytes, 4 * model.config.n_embd * layers
    tokens_now = batch * (1 if decode else PROMPT)
    return Trial(
        ours=ours, baselines=baselines, errors=errors, tolerance=TOLERANCE[compute],
        baseline_tolerance=BASELINE_TOLERANCE,
        flops=2.0 * digits * (block_products(model, tokens_now, batch) + head * batch),
        bytes=packed_bytes(model) + batch * PROMPT * kv, skipped=skipped, bound="bytes" if decode else "flops",
        arithmetic="int8",
    )  # fmt: skip


def _prefilling(theirs: Any, prompt: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    def run() -> tuple[Tensor, Tensor]:
        logits = theirs(prompt, use_cache=True, logits_to_keep=1).logits[:, -1]
        return logits, logits.argmax(-1)

    return run


def _decoding(theirs: Any, prompt: Tensor, following: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    parameters = inspect.signature(type(theirs).forward).parameters
    name = "cache" if "cache" in parameters else "past_key_values"  # transformers renamed it in 5.24
    with torch.inference_mode():
        cache = getattr(theirs(prompt, use_cache=True, logits_to_keep=1), name)

    def run() -> tuple[Tensor, Tensor]:
        if cache.get_seq_length() > PROMPT:
            cache.crop(-1)
        logits = theirs(following, **{name: cache}, use_cache=True).logits[:, -1]
        return logits, logits.argmax(-1)

    return run


def _bitsandbytes(model: GPTJ) -> tuple[Any, str]:
    free = available_bytes("cpu")
    if free is not None and free < 6 << 30:
        return None, f"needs 6 GiB for two more models, {free >> 20} MiB are free"
    return gptj_peers.bitsandbytes_model(model)


def prepare_generation(workload: Workload) -> Trial:
    """Prefill and NEW greedy tokens, the one thing that every engine offers as a call."""
    layers, model = workload.shape["L"], gptj_peers.ours(workload.shape["L"])
    compute = "w8a8" if workload.options.get("w8a8") else "w8a16"
    prompt, true = ids(16, PROMPT + 1)[:1, :PROMPT], expected_logits(layers)[0]
    theirs, skipped = peers(layers)["transformers"], {}

    def ours() -> list[int]:
        model.compute = compute
        return model.generate(prompt, max_new_tokens=NEW, eos_token_id=()).tokens[0]

    def by_transformers() -> list[int]:
        how = dict(do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0)
        return theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **how)[0, PROMPT:].tolist()

    baselines = {"eager": _implementation(theirs, "eager")(by_transformers)}
    if "ctranslate2" not in peers(layers):
        peers(layers)["ctranslate2"] = gptj_peers.ctranslate2_model(theirs)
    generate, skipped_because = peers(layers)["ctranslate2"]
    if generate is None:
        skipped["ctranslate2"] = skipped_because
    else:
        baselines["ctranslate2"] = lambda: generate(prompt[0].tolist(), NEW)

    likeliest = true.topk(10).indices.tolist()

    def errors(found: list[int]) -> dict[str, float]:
        """Of random weights the likeliest tokens are close to each other, and 8 bits may change their order."""
        return {"first token": 0.0 if len(found) == NEW and found[0] in likeliest else 1.0}

    return Trial(
        ours=ours, baselines=baselines, errors=errors, tolerance=0.0, baseline_tolerance=0.0, skipped=skipped,
        flops=2.0 * block_products(model, PROMPT + NEW, NEW + 1), bytes=(NEW + 1) * packed_bytes(model), bound="bytes",
        arithmetic="int8",
    )  # fmt: skip


def prepare_training(workload: Workload) -> Trial:
    layers = workload.shape["L"]
    model = gptj_peers.ours(layers)
    generator = torch.Generator().manual_seed(3)
    embeds = (0.02 * torch.randn(CAPTIONS, CAPTION, model.config.n_embd, generator=generator)).bfloat16()
    embeds.requires_grad_()
    labels = ids(CAPTIONS, CAPTION).clone()
    labels[:, :SOFT_PROMPTS] = -100

    def step(function: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
        def run() -> tuple[Tensor, Tensor]:
            loss = function()
            return loss.detach(), torch.autograd.grad(loss, embeds)[0]

        return run

    def ours() -> Tensor:
        model.compute = "w8a16"
        return model(inputs_embeds=embeds, labels=labels, logits_to_keep=1).loss

    baselines, skipped = {}, {}
    theirs = peers(layers)["transformers"]
    theirs.set_attn_implementation("eager")
    baselines["eager"] = step(lambda: theirs(inputs_embeds=embeds, labels=labels, use_cache=False).loss)
    quantised, reason = _bitsandbytes(model)
    if quantised is None:
        skipped["bitsandbytes"] = reason
    else:
        baselines["bitsandbytes"] = step(lambda: quantised(inputs_embeds=embeds, labels=labels, use_cache=False).loss)

    wide = embeds.detach()[0].float().requires_grad_()
    hidden = gptj_peers.reference(model, wide)[SOFT_PROMPTS - 1 : -1]
    logits = hidden @ model.lm_head.weight.dequantize().T + model.lm_head.bias
    loss = torch.nn.functional.cross_entropy(logits, labels[0, SOFT_PROMPTS:])
    true = torch.autograd.grad(loss, wide)[0] / CAPTIONS

    def errors(result: tuple[Tensor, Tensor]) -> dict[str, float]:
        return {"inputs_embeds": cases.errors(result[1][0], true)[0]}

    products = 2.0 * 2 * 2 * block_products(model, CAPTIONS * CAPTION, CAPTIONS * (CAPTION - SOFT_PROMPTS + 1))
    head = 2.0 * 2 * 2 * model.lm_head.weight.packed.nbytes * CAPTIONS * (CAPTION - SOFT_PROMPTS)
    return Trial(
        ours=step(ours), baselines=baselines, errors=errors, tolerance=TOLERANCE["w8a16"],
        baseline_tolerance=BASELINE_TOLERANCE, flops=products + head, bytes=2 * packed_bytes(model), skipped=skipped,
        arithmetic="int8",
    )  # fmt: skip


PREPARE = {"decode": prepare_inference, "prefill": prepare_inference, "generate": prepare_generation,
           "train": prepare_training}  # fmt: skip


def workload(group: str, shape: dict[str, int], *, quick: bool = False, **fields):
    weights = shape["L"] * 201e6 + 206e6
    tokens = {"decode": 16 * shape["B"], "prefill": PROMPT, "generate": PROMPT + 16 * NEW, "train": 3 * 8 * CAPTION}
    row = Workload("gptj", group, shape, "bfloat16", cost=4 * weights * tokens[group], prepare=PREPARE[group],
                   stem="int8_linear", **fields)  # fmt: skip
    return pytest.param(row, id=f"{group}-{row.name}", marks=[pytest.mark.quick] if quick else [])


MODES = ({}, {"w8a8": 1})
WORKLOADS = [
    *(workload("decode", {"L": PAIRED, "B": batch, "S": PROMPT}, options=mode)
      for batch in (1, 4, 16) for mode in MODES),
    *(workload("prefill", {"L": PAIRED, "B": 1, "S": PROMPT}, options=mode) for mode in MODES),
    *(workload("generate", {"L": PAIRED, "B": 1, "S": PROMPT}, options=mode) for mode in MODES),
    workload("train", {"L": PAIRED, "B": CAPTIONS, "S": CAPTION}),
    *(workload(group, {"L": WHOLE, "B": 1, "S": PROMPT}) for group in ("decode", "prefill")),
]  # fmt: skip


@pytest.mark.parametrize("workload", WORKLOADS)
def test_gptj(compare, workload):
    pytest.importorskip("transformers")
    needed, free = 8 << 30, available_bytes(workload.device)
    if free is not None and free < needed:
        pytest.skip(f"needs {needed >> 20} MiB, {free >> 20} are free")
    if workload.shape["L"] != PAIRED:  # the whole model takes the place of the others
        peers.cache_clear()
    compare(workload)
