"""LiMBeR at GPT-J's width, six layers, features given: training step, captions, and few-shot answers.

CLIP RN50x16's 144 x 3072 features. `eager` is the same in plain PyTorch over transformers' GPT-J in bf16 with eager
attention: a linear map, concatenation with the embedded text, padding to the longest, its loss or greedy `generate`.
A training step ends at the gradient of P and b. `encoder` is what both would pay for features that are not given.
Memory: `weights_bytes` and `peak_bytes` of each together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import gptj_peers
import pytest
import torch
import torch.nn.functional as F
from bench_gptj import BASELINE_TOLERANCE, PAIRED, TOLERANCE, block_products, packed_bytes, peers
from comparison import Trial, Workload, available_bytes
from torch import Tensor

from limber_fast import Limber

K, D = 144, 3072
CAPTIONS, LONGEST = 8, 16  # tokens of a caption: 9 to 16
PROMPT, NEW = ["w32", "w4286", "w286"], 15
SHOTS, TEXT, ANSWER = 4, 12, 5
CHECKED = 512  # columns of the features that the first picture alone has: its share of P's gradient can be told


def limber_of(model: Any) -> Limber:
    torch.manual_seed(4)
    return Limber(None, model, gptj_peers.word_per_id(model.config.vocab_size), width=D, dropout=0.0)


def features_of(n: int) -> Tensor:
    features = 0.5 * torch.randn(n, K, D, generator=torch.Generator().manual_seed(6))
    features[0, :, CHECKED:], features[1:, :, :CHECKED] = 0, 0
    return features.bfloat16()


def theirs_of() -> Any:
    theirs = peers(PAIRED)["transformers"]
    theirs.set_attn_implementation("eager")
    return theirs


def bytes_of(model: Any) -> int:
    return sum(x.nbytes for x in (*model.parameters(), *model.buffers()))


def prepare_training(workload: Workload) -> Trial:
    model, theirs = gptj_peers.ours(PAIRED), theirs_of()
    model.compute = "w8a16"
    limber, features = limber_of(model).train(), features_of(CAPTIONS)
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(LONGEST - 7, LONGEST + 1, (CAPTIONS,), generator=generator).tolist()
    captions = [torch.randint(50256, (n,), generator=generator).tolist() for n in lengths]
    weight, bias = limber.projection.weight, limber.projection.bias
    eos = model.config.eos_token_ids[0]

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        loss = limber(features, captions)
        return loss.detach(), *torch.autograd.grad(loss, (weight, bias))

    def eager() -> tuple[Tensor, Tensor, Tensor]:
        ids = torch.full((CAPTIONS, LONGEST + 1), eos)
        mask = torch.zeros(CAPTIONS, K + LONGEST + 1, dtype=torch.long)
        for row, caption in enumerate(captions):
            ids[row, : len(caption)] = torch.tensor(caption)
            mask[row, : K + len(caption) + 1] = 1
        labels = torch.cat([torch.full((CAPTIONS, K), -100), ids], 1).masked_fill(mask == 0, -100)
        soft = F.linear(features, weight.bfloat16(), bias.bfloat16())
        embeds = torch.cat([soft, F.embedding(ids, theirs.transformer.wte.weight)], 1)
        loss = theirs(inputs_embeds=embeds, attention_mask=mask, labels=labels, use_cache=False).loss
        return loss.detach(), *torch.autograd.grad(loss, (weight, bias))

    first = torch.tensor([*captions[0], eos])
    wide = weight.detach().bfloat16().float().requires_grad_()
    soft = F.linear(features[0].float(), wide, bias.detach().bfloat16().float())
    hidden = gptj_peers.reference(model, torch.cat([soft, model.embed(first).float()]))[K - 1 : -1]
    logits = hidden @ model.lm_head.weight.dequantize().T + model.lm_head.bias
    loss = F.cross_entropy(logits, first, reduction="sum") / (sum(lengths) + CAPTIONS)
    true = torch.autograd.grad(loss, wide)[0][:, :CHECKED]

    def errors(found: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
        return {"weight": cases.errors(found[1][:, :CHECKED], true)[0]}

    tokens = CAPTIONS * (K + 1) + sum(lengths)
    head = 2.0 * 2 * 2 * model.lm_head.weight.packed.nbytes * (sum(lengths) + CAPTIONS)
    return Trial(
        ours=ours, baselines={"eager": eager}, errors=errors, tolerance=TOLERANCE["w8a16"],
        baseline_tolerance=BASELINE_TOLERANCE,
        flops=2.0 * 2 * 2 * block_products(model, tokens, sum(lengths) + CAPTIONS) + head,
        bytes=2 * packed_bytes(model), arithmetic="int8", weights={"": bytes_of(model), "eager": bytes_of(theirs)},
    )  # fmt: skip


def generating(theirs: Any, embeds: Callable[[], Tensor], new: int) -> Callable[[], list[list[int]]]:
    how = dict(do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0)

    @torch.inference_mode()
    def run() -> list[list[int]]:
        x = embeds()
        mask = torch.ones(x.shape[:2], dtype=torch.long)
        return theirs.generate(inputs_embeds=x, attention_mask=mask, **how)[:, -new:].tolist()

    return run


def prepare_saying(workload: Workload) -> Trial:
    """Captions behind one picture each, or answers behind four shots and a picture."""
    pictures, shots = workload.shape["B"], workload.shape.get("shots", 0)
    model, theirs = gptj_peers.ours(PAIRED), theirs_of()
    model.compute = compute = "w8a8" if workload.options.get("w8a8") else "w8a16"
    limber, features, shown = limber_of(model).eval(), features_of(pictures), features_of(shots + 1)[1:]
    question = " ".join(f"w{i}" for i in range(100, 100 + TEXT - 2))
    new = ANSWER if shots else workload.shape["new"]
    said: list[list[int]] = []

    def on_token(row: int, token: int, text: str) -> None:
        said[row].append(token)

    def ours() -> list[list[int]]:
        said[:] = [[] for _ in range(pictures)]
        how: dict[str, Any] = {"max_new_tokens": new, "eos_token_id": (), "on_token": on_token}
        if shots:
            limber.answer(features, [question] * pictures, [(x, question, "") for x in shown], separator="", **how)
        else:
            limber.caption(features, " ".join(PROMPT), **how)
        return [list(tokens) for tokens in said]

    text = limber.tokenizer(f"Q: {question} A:" if shots else " ".join(PROMPT)).input_ids
    ids, weight, bias = torch.tensor(text), *(p.detach().bfloat16() for p in limber.projection.parameters())

    def embeds() -> Tensor:
        """[B, S, E]."""
        words = F.embedding(ids, theirs.transformer.wte.weight)
        soft = F.linear(features, weight, bias)
        before = [x for one in F.linear(shown, weight, bias) for x in (one, words)] if shots else []
        return torch.stack([torch.cat([*before, one, words]) for one in soft])

    with torch.no_grad():
        hidden = gptj_peers.reference(model, embeds()[0].float())[-1]
        likeliest = (hidden @ model.lm_head.weight.dequantize().T + model.lm_head.bias).topk(10).indices.tolist()

    def errors(found: list[list[int]]) -> dict[str, float]:
        """Of random weights the likeliest tokens are close to each other, and 8 bits may change their order."""
        right = [len(tokens) for tokens in found] == [new] * pictures and found[0][0] in likeliest
        return {"first token": 0.0 if right else 1.0}

    tokens = pictures * (K + len(ids) + new) + shots * (K + len(ids))
    digits = 1 if compute == "w8a8" else 2
    return Trial(
        ours=ours, baselines={"eager": generating(theirs, embeds, new)}, errors=errors, tolerance=0.0,
        baseline_tolerance=0.0, flops=2.0 * digits * block_products(model, tokens, pictures * new),
        bytes=(new + 1) * packed_bytes(model), bound="flops" if shots or pictures > 4 else "bytes", arithmetic="int8",
        weights={"": bytes_of(model), "eager": bytes_of(theirs)},
    )  # fmt: skip


def prepare_encoder(workload: Workload) -> Trial:
    pytest.importorskip("open_clip")
    from limber_fast.models.encoders import encoder

    clip = encoder("clip-random")
    pixels = torch.randn(workload.shape["B"], 3, *clip.size, generator=torch.Generator().manual_seed(8))

    @torch.inference_mode()
    def ours() -> Tensor:
        return clip(pixels)

    def errors(found: Tensor) -> dict[str, float]:
        """The last picture by itself."""
        with torch.inference_mode():
            return {"features": cases.errors(found[-1], clip(pixels[-1:])[0].double())[0]}

    macs = 0
    hooks = [m.register_forward_hook(_counting(counted := [])) for m in clip.modules() if hasattr(m, "in_channels")]
    with torch.inference_mode():
        clip(pixels[:1])
    for hook in hooks:
        hook.remove()
    macs = sum(counted)
    return Trial(
        ours=ours, baselines={}, errors=errors, tolerance=1e-3, baseline_tolerance=0.0,
        flops=2.0 * macs * len(pixels), bytes=bytes_of(clip), weights={"": bytes_of(clip)},
    )  # fmt: skip


def _counting(counted: list[int]) -> Callable[..., None]:
    """Multiply-adds of each convolution."""
    return lambda conv, _, out: counted.append(out[0].numel() * conv.weight[0].numel())


PREPARE = {"train": prepare_training, "caption": prepare_saying, "vqa": prepare_saying, "encoder": prepare_encoder}


def workload(group: str, shape: dict[str, int], **options: float) -> Any:
    tokens = {"train": 3 * CAPTIONS * 160, "caption": shape["B"] * 170, "vqa": shape["B"] * 800, "encoder": 100}
    dtype = "float32" if group == "encoder" else "bfloat16"
    row = Workload("limber", group, shape, dtype, prepare=PREPARE[group], options=options, cost=6e9 * tokens[group],
                   fewest_rounds=1, stem="int8_linear")  # fmt: skip
    return pytest.param(row, id=f"{group}-{row.name}")


WORKLOADS = [
    workload("train", {"B": CAPTIONS}),
    *(workload("caption", {"B": batch, "new": NEW}, w8a8=1) for batch in (1, 8, 32)),
    workload("caption", {"B": 16, "new": 2 * NEW}, w8a8=1),  # nobody ends early, and LiMBeR allows 100
    workload("caption", {"B": 1, "new": NEW}),
    workload("vqa", {"B": 4, "shots": SHOTS}, w8a8=1),
    workload("vqa", {"B": 4, "shots": SHOTS}),
    workload("encoder", {"B": 4}),
]


@pytest.mark.parametrize("workload", WORKLOADS)
def test_limber(compare, workload):
    pytest.importorskip("transformers")
    needed, free = 9 << 30, available_bytes(workload.device)
    if free is not None and free < needed:
        pytest.skip(f"needs {needed >> 20} MiB, {free >> 20} are free")
    compare(workload)
