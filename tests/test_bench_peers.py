"""The rows for CUDA with all their peers, small and on the CPU: torch.compile, and packages by modules of the same
signatures that compute in eager PyTorch and refuse what the packages refuse. No time is asserted."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from limber_fast import dispatch, native

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("flash_attn", "xformers", "bitsandbytes", "liger_kernel", "inf_cl")
# Small shapes of the rows whose group is 'cuda', and the peers that each must have.
ROWS = {
    "decode after a prefix": (
        "prefix_attention", {"B": 3, "P": 300, "S": 20, "T": 1}, {}, ("compile", "flash_attn", "xformers")),
    "chunk": ("prefix_attention", {"B": 2, "P": 0, "S": 250, "T": 9}, {}, ("compile", "flash_attn", "xformers")),
    "w8a16": ("int8_linear", {"M": 4, "N": 64, "K": 128}, {}, ("compile", "compile_int8", "bitsandbytes")),
    "w8a8": (
        "int8_linear", {"M": 24, "N": 96, "K": 128}, {"w8a8": 1, "gelu": 1},
        ("compile", "compile_int8", "bitsandbytes")),
    "cross entropy": (
        "frozen_cross_entropy", {"M": 24, "labelled": 9, "V": 200}, {}, ("labelled", "compile", "liger")),
    "InfoNCE": ("info_nce", {"N": 48, "D": 256}, {}, ("eager_fp32", "compile", "inf_cl", "liger")),
    "soft prompts": ("project_concat", {"B": 2, "images": 1, "k": 3, "D": 64, "E": 32}, {}, ("compile",)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch, request):
    try:
        native.cpu()
    except dispatch.BackendUnavailable as missing:
        pytest.skip(f"no kernels to hold against the peers: {missing}")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    request.config.addinivalue_line("markers", "quick: of benchmarks/conftest.py")
    # What is checked is the arithmetic and that no part is left to Python; code generation takes half a minute a row.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))


@pytest.fixture
def packages(monkeypatch):
    """Stands for the packages where there is no GPU for them to run on."""
    installed = {
        "flash_attn": {"flash_attn_with_kvcache": flash_attn_with_kvcache},
        "xformers": {}, "xformers.ops": {"fmha": FMHA},
        "bitsandbytes": {"MatmulLtState": SimpleNamespace, "matmul": bitsandbytes_matmul},
        "liger_kernel": {}, "liger_kernel.transformers": {"LigerFusedLinearCrossEntropyLoss": LigerLoss},
        "inf_cl": {"cal_flash_loss": cal_flash_loss},
    }  # fmt: skip
    for name, contents in installed.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)


def prepared(op: str, shape: dict[str, int], options: dict[str, float], dtype: str = "bfloat16"):
    bench = import_module(f"bench_{op}")
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(bench, "COLD_BYTES"):
            patch.setattr(bench, "COLD_BYTES", 1 << 16)
        row = next(one.values[0] for one in bench.WORKLOADS if one.values[0].group == "cuda")
        assert row.device == "cuda"
        return bench.prepare(replace(row, shape=shape, options=options, dtype=dtype, device="cpu"))


@pytest.mark.parametrize("name", ROWS)
def test_every_peer_gives_what_the_op_gives(name, packages):
    op, shape, options, peers = ROWS[name]
    trial = prepared(op, shape, options)
    assert not (trial.skipped.keys() - {"open_clip"}) and set(peers) <= trial.baselines.keys()
    for peer, call in {"": trial.ours, **trial.baselines}.items():
        limit = trial.baseline_tolerance if peer else trial.tolerance
        for _ in range(3):  # some go round several weights or caches
            for output, error in trial.errors(call()).items():
                assert error <= limit, (peer or "limber_fast", output, error)


@pytest.mark.parametrize("name", ROWS)
def test_a_package_that_is_missing_is_named(name, monkeypatch):
    for package in PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)
    op, shape, options, peers = ROWS[name]
    trial = prepared(op, shape, options)
    modules = {"liger": "liger_kernel"}
    for peer in {modules.get(peer, peer): peer for peer in peers}.items():
        if peer[0] in PACKAGES:
            assert trial.skipped[peer[1]].startswith(f"{peer[0]}") and "is not installed" in trial.skipped[peer[1]]
            assert peer[1] not in trial.baselines


def test_what_a_package_refuses_is_told_in_one_line(packages):
    skipped = prepared("prefix_attention", *ROWS["decode after a prefix"][1:3], dtype="float32").skipped
    assert skipped == {"flash_attn": "FlashAttention only support fp16 and bf16 data type",
                       "xformers": "Operator does not support inputs: dtype=torch.float32"}  # fmt: skip
    skipped = prepared("prefix_attention", {"B": 1, "P": 0, "S": 4, "T": 17}, {}).skipped
    assert skipped.keys() == {"xformers"} and "not be larger than 16" in skipped["xformers"]
    assert "256 features; got 64" in prepared("info_nce", {"N": 48, "D": 64}, {}).skipped["inf_cl"]
    skipped = prepared("int8_linear", {"M": 16, "N": 96, "K": 128}, {"w8a8": 1}).skipped
    assert skipped == {"compile_int8": "torch._int_mm takes more than 16 rows on CUDA"}


def test_a_wrong_peer_is_found_out(packages, monkeypatch):
    """Cached tokens one short: the last one is overwritten and the positions are off."""
    right = flash_attn_with_kvcache
    monkeypatch.setattr(
        sys.modules["flash_attn"], "flash_attn_with_kvcache",
        lambda *args, cache_seqlens, **how: right(*args, cache_seqlens=cache_seqlens - 1, **how),
    )  # fmt: skip
    trial = prepared(*ROWS["decode after a prefix"][:3])
    assert max(trial.errors(trial.baselines["flash_attn"]()).values()) > trial.baseline_tolerance


def attention(q, keys, values, cached: int):
    """q [T, H, D] behind `cached` tokens of keys and values [S, H, D], in fp32."""
    seen = torch.arange(len(keys)) <= torch.arange(cached, cached + len(q))[:, None]
    q, keys, values = (x.float().transpose(0, 1) for x in (q, keys, values))
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen).transpose(0, 1)


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
    cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False,
):  # fmt: skip
    """flash-attn 2.8: paged, with rotary; the checks are those of its C++ part."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    b, new, heads, width = q.shape
    assert width <= 256 and k_cache.shape[1] % 256 == 0 and k_cache.shape[2:] == (heads, width)
    assert block_table.dtype == cache_seqlens.dtype == torch.int32 and block_table.shape[0] == len(cache_seqlens) == b
    assert rotary_cos.dtype == rotary_sin.dtype == q.dtype and rotary_cos.is_contiguous() and rotary_sin.is_contiguous()
    assert len(rotary_cos) >= block_table.shape[1] * k_cache.shape[1] and rotary_cos.shape[1] % 8 == 0
    assert causal and rotary_interleaved

    def turned(x, start):
        cos, sin = (part[start : start + new, None].float() for part in (rotary_cos, rotary_sin))
        even, odd = x[..., : 2 * cos.shape[-1]].float().unflatten(-1, (-1, 2)).unbind(-1)
        pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
        return torch.cat([pairs.to(x.dtype), x[..., 2 * cos.shape[-1] :]], -1)

    out = torch.empty_like(q)
    for n, start in enumerate(cache_seqlens.tolist()):
        at = torch.arange(start, start + new)
        page = block_table[n, at // k_cache.shape[1]].long()
        k_cache[page, at % k_cache.shape[1]], v_cache[page, at % k_cache.shape[1]] = turned(k[n], start), v[n]
        keys, values = (x[block_table[n].long()].flatten(0, 1)[: start + new] for x in (k_cache, v_cache))
        out[n] = attention(turned(q[n], start), keys, values, start)
    return out


class PagedMask:
    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen, block_tables, page_size, *, device=None):
        mask = cls()
        mask.q_seqlen, mask.kv_seqlen, mask.block_tables, mask.page_size = q_seqlen, kv_seqlen, block_tables, page_size
        return mask


def memory_efficient_attention_forward(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None,
                                       output_dtype=None):  # fmt: skip
    """xformers 0.0.35 with its split-K operator and a paged, causal bias."""
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"Operator does not support inputs:\n    dtype={query.dtype}")
    if max(attn_bias.q_seqlen) > 16:
        raise ValueError("Query length should not be larger than 16 for causal or local attention biases")
    assert op is FMHA.triton_splitk.FwOp and query.shape[0] == key.shape[0] == value.shape[0] == 1
    assert query.shape[1] == sum(attn_bias.q_seqlen) and key.shape[1] % attn_bias.page_size == 0
    out = []
    for q, length, table in zip(
        query[0].split(attn_bias.q_seqlen), attn_bias.kv_seqlen, attn_bias.block_tables.long(), strict=True
    ):
        keys, values = (x[0].unflatten(0, (-1, attn_bias.page_size))[table].flatten(0, 1)[:length]
                        for x in (key, value))  # fmt: skip
        out.append(attention(q, keys, values, length - len(q)).to(q.dtype))
    return torch.cat(out)[None]


FMHA = SimpleNamespace(
    attn_bias=SimpleNamespace(PagedBlockDiagonalCausalWithOffsetPaddedKeysMask=PagedMask),
    triton_splitk=SimpleNamespace(FwOp=type("FwOp", (), {})),
    memory_efficient_attention_forward=memory_efficient_attention_forward,
)


def bitsandbytes_matmul(A, B, out=None, state=None, threshold=0.0, bias=None):
    """bitsandbytes 0.50 where the state has the weight: rows rounded to 8 bits, SCB 127 times their step."""
    assert A.dtype == torch.float16 and not state.has_fp16_weights and not state.is_training
    step = A.float().abs().amax(1, keepdim=True) / 127
    return ((A / step).round() @ state.CB.float().T * step * state.SCB / 127).half()


class LigerLoss(torch.nn.Module):
    def forward(self, lin_weight, _input, target, bias=None):
        return F.cross_entropy(F.linear(_input, lin_weight, bias).float(), target)


def cal_flash_loss(q, k, labels=None, scale=None, head_dim=256):
    return F.cross_entropy((scale * q @ k.T).float(), torch.arange(len(q)), reduction="none")
