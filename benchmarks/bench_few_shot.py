"""Few-shot questions at GPT-J's width: the shots computed once, against every question with its own, and transformers.

CLIP's 144 soft prompts and 12 tokens of text for a shot and for a question; answers of 5 tokens. `without_reuse` is our
own path with whole prompts, `eager` transformers in bf16, one question after another, `eager_prefix` the same on deep
copies of a cache that holds the shots. Arithmetic allows (Q (L + s)) / (L + Q s) for shots of L tokens in all and Q
questions of s: `arithmetic` beside a row.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import gptj_peers
import pytest
import torch
from bench_gptj import PAIRED, block_products, packed_bytes, peers
from comparison import Trial, Workload, available_bytes

SOFT_PROMPTS, TEXT, ANSWER = 144, 12, 5
SHOT = SOFT_PROMPTS + TEXT


def arithmetic(shots: int, questions: int) -> float:
    length = shots * SHOT
    return questions * (length + SHOT) / (length + questions * SHOT)


def prepare(workload: Workload) -> Trial:
    shots, questions = workload.shape["shots"], workload.shape["Q"]
    model = gptj_peers.ours(PAIRED)
    model.compute = "w8a8" if workload.options.get("w8a8") else "w8a16"
    width, generator = model.config.n_embd, torch.Generator().manual_seed(5)
    before = (0.02 * torch.randn(shots * SHOT, width, generator=generator)).bfloat16()
    asked = list((0.02 * torch.randn(questions, SHOT, width, generator=generator)).bfloat16())
    whole = [torch.cat([before, question]) for question in asked]
    how: dict[str, Any] = {"max_new_tokens": ANSWER, "eos_token_id": ()}

    def ours() -> list[list[int]]:
        with model.prefix(inputs_embeds=before, room=questions * 2 * SHOT) as prefix:
            return model.generate(inputs_embeds=asked, prefix=prefix, **how).tokens

    baselines: dict[str, Callable[[], Any]] = {
        "without_reuse": lambda: model.generate(inputs_embeds=whole, **how).tokens
    }
    if questions <= 8:  # 2 seconds a question
        baselines |= _transformers(before, asked, whole)

    hidden = gptj_peers.reference(model, whole[0].float())[-1]
    likeliest = (hidden @ model.lm_head.weight.dequantize().T + model.lm_head.bias).topk(10).indices.tolist()

    def errors(found: list[list[int]]) -> dict[str, float]:
        """Of random weights the likeliest tokens are close to each other, and 8 bits may change their order."""
        right = [len(answer) for answer in found] == [ANSWER] * questions and found[0][0] in likeliest
        return {"first token": 0.0 if right else 1.0}

    tokens = shots * SHOT + questions * (SHOT + ANSWER)
    digits = 1 if model.compute == "w8a8" else 2
    return Trial(
        ours=ours, baselines=baselines, errors=errors, tolerance=0.0, baseline_tolerance=0.0,
        flops=2.0 * digits * block_products(model, tokens, questions * ANSWER),
        bytes=(ANSWER + 1) * packed_bytes(model), arithmetic="int8",
    )  # fmt: skip


def _transformers(before: Any, asked: list[Any], whole: list[Any]) -> dict[str, Callable[[], Any]]:
    theirs = peers(PAIRED)["transformers"]
    theirs.set_attn_implementation("eager")
    parameters = inspect.signature(type(theirs).forward).parameters
    name = "cache" if "cache" in parameters else "past_key_values"  # transformers renamed it in 5.24

    @torch.inference_mode()
    def answer(embeds: Any, cache: Any) -> list[int]:
        found, said = theirs(inputs_embeds=embeds[None], use_cache=True, logits_to_keep=1, **{name: cache}), []
        for step in range(ANSWER):
            said.append(int(found.logits[0, -1].argmax()))
            if step < ANSWER - 1:
                token = torch.tensor([[said[-1]]])
                found = theirs(token, use_cache=True, **{name: getattr(found, name)})
        return said

    def copied() -> list[list[int]]:
        with torch.inference_mode():
            cache = getattr(theirs(inputs_embeds=before[None], use_cache=True, logits_to_keep=1), name)
        return [answer(question, copy.deepcopy(cache)) for question in asked]

    return {"eager": lambda: [answer(prompt, None) for prompt in whole], "eager_prefix": copied}


def workload(shots: int, questions: int, mode: dict[str, float]) -> Any:
    options = {**mode, "arithmetic": round(arithmetic(shots, questions), 2)}
    row = Workload("few_shot", "reuse", {"shots": shots, "Q": questions}, "bfloat16", prepare=prepare, options=options,
                   cost=4e9 * questions * (shots + 1) * SHOT, fewest_rounds=1, stem="int8_linear")  # fmt: skip
    return pytest.param(row, id=row.name)


@pytest.mark.parametrize(
    "workload",
    [
        *(workload(4, questions, {"w8a8": 1}) for questions in (1, 2, 4, 8, 32)),  # the chart of the page
        *(workload(4, questions, {}) for questions in (1, 32)),
        workload(8, 32, {"w8a8": 1}),
    ],
)
def test_few_shot(compare, workload):
    pytest.importorskip("transformers")
    needed, free = 8 << 30, available_bytes(workload.device)
    if free is not None and free < needed:
        pytest.skip(f"needs {needed >> 20} MiB, {free >> 20} are free")
    compare(workload)
