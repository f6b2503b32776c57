"""Int8Weight: quantisation against its reference, stacking, and the ways it is kept: state_dict and files."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from limber_fast import Int8Weight, int8_linear, quantize_int8
from limber_fast.ops.int8_weight import to_rows
from limber_fast.reference.int8_linear import quantize_int8 as reference

SIZES = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 129]))


def _matrix(n, k, seed=0, dtype=torch.float32):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _same(a: Int8Weight, b: Int8Weight) -> bool:
    return a.shape == b.shape and all(torch.equal(x, y) for x, y in zip(a.buffers(), b.buffers(), strict=True))


@settings(max_examples=60, deadline=None)
@given(n=SIZES, k=SIZES, seed=st.integers(0, 2**20), decades=st.integers(0, 30),
       dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))  # fmt: skip
def test_integers_scales_and_sums(n, k, seed, decades, dtype):
    weight = _matrix(n, k, seed) * 10.0 ** torch.linspace(-decades, 0, n)[:, None]
    weight = weight.to(dtype)
    found, (q, scales) = quantize_int8(weight), reference(weight)
    assert found.shape == (n, k)
    assert torch.equal(found.integers(), q) and torch.equal(found.scales, scales)
    assert torch.equal(found.row_sums, q.sum(1, dtype=torch.int32))
    assert torch.equal(found.column_sums, q.sum(0, dtype=torch.int32))
    assert q.abs().max() <= 127
    assert ((found.dequantize(torch.float64) - weight).abs() <= 0.5001 * scales[:, None] + 1e-45).all()


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 70), min_size=1, max_size=4), k=SIZES, seed=st.integers(0, 2**20))
def test_stacked_matrices_are_their_concatenation(sizes, k, seed):
    parts = [_matrix(n, k, seed + i) for i, n in enumerate(sizes)]
    assert _same(quantize_int8(parts), quantize_int8(torch.cat(parts)))


def test_large_weights_go_part_by_part(monkeypatch):
    from limber_fast.ops import int8_weight

    weight = _matrix(70, 130)
    whole = quantize_int8(weight)
    monkeypatch.setattr(int8_weight, "_ROWS_AT_ONCE", 900)  # 6 rows at a time: parts that straddle blocks
    assert _same(quantize_int8([weight[:33], weight[33:]]), whole)


def test_packed_layout_and_padding():
    weight = quantize_int8(_matrix(37, 70))
    q = torch.nn.functional.pad(weight.integers(), (0, 58, 0, 27))
    assert weight.packed.shape == (2, 32, 32, 4)
    assert torch.equal(weight.packed, q.reshape(2, 32, 32, 4).permute(0, 2, 1, 3))


def test_channels_of_zeros():
    weight = quantize_int8(torch.tensor([[0.0, 0.0], [1.0, -2.0], [1e-45, 0.0]]))
    assert weight.scales[0] == 0 and weight.scales[2] == 0
    assert torch.equal(weight.integers(), torch.tensor([[0, 0], [64, -127], [0, 0]], dtype=torch.int8))
    assert torch.equal(int8_linear(torch.ones(1, 2), weight)[0, [0, 2]], torch.zeros(2))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_that_are_not_finite_are_refused(value, dtype):
    weight = _matrix(50, 9, dtype=dtype)
    weight[41, 3] = value
    with pytest.raises(ValueError, match=r"^quantize_int8: weight must be finite; got NaN or Inf in row 41; an int8"):
        quantize_int8(weight)
    with pytest.raises(ValueError, match=r"in row 61;"):
        quantize_int8([_matrix(20, 9, dtype=dtype), weight])


BAD = {
    "a number": (1.0, TypeError, r"weight must be a tensor \[N, K\] or a sequence of them; got float"),
    "none": ([], TypeError, r"weight must be a tensor \[N, K\] or a sequence of them; got list"),
    "a vector": (torch.ones(3), ValueError, r"weight must be \[N, K\], N and K of at least 1; got shape \(3,\)"),
    "empty": (torch.ones(0, 3), ValueError, r"weight must be \[N, K\], N and K of at least 1; got shape \(0"),
    "integers": (torch.ones(2, 3).long(), TypeError, r"weight must be fp16, bf16, fp32 or fp64; got torch.int64"),
    "another K": ([torch.ones(2, 3), torch.ones(2, 4)], ValueError, r"weight must be \[N, K\] with the K = 3 of the"),
    "meta": (torch.ones(2, 3, device="meta"), ValueError, r"weight must hold data; got a tensor on meta"),
}  # fmt: skip


@pytest.mark.parametrize("weight, kind, message", BAD.values(), ids=BAD)
def test_errors_of_quantize(weight, kind, message):
    with pytest.raises(kind, match="^quantize_int8: " + message):
        quantize_int8(weight)


# --- as a module ----------------------------------------------------------------------------------------------------


def test_state_dict_round_trip_and_deep_copy():
    model = torch.nn.ModuleDict({"fc_in": quantize_int8(_matrix(37, 70)), "norm": torch.nn.LayerNorm(70)})
    fresh = torch.nn.ModuleDict({"fc_in": Int8Weight(37, 70), "norm": torch.nn.LayerNorm(70)})
    assert all(isinstance(value, torch.Tensor) for value in model.state_dict().values())
    fresh.load_state_dict(model.state_dict())
    assert _same(fresh["fc_in"], model["fc_in"]) and _same(copy.deepcopy(model)["fc_in"], model["fc_in"])
    assert not list(model["fc_in"].parameters())
    blank = Int8Weight(37, 70, device="meta")
    blank.load_state_dict(model["fc_in"].state_dict(), assign=True)
    assert _same(blank, model["fc_in"])


def test_rows_of_a_gpu_and_blocks_of_the_cpu_hold_the_same(tmp_path):
    weight, x = quantize_int8(_matrix(37, 70)), _matrix(5, 70, 1)
    rows = copy.deepcopy(weight)
    rows.packed = to_rows(weight.packed, 37)
    assert rows.packed.shape == (37, 128) and torch.equal(rows.packed[:, :70], weight.integers())
    assert torch.equal(rows.integers(), weight.integers()) and not rows.packed[:, 70:].any()
    assert torch.equal(*(int8_linear(x, w, backend="eager") for w in (rows, weight)))
    fresh, assigned = Int8Weight(37, 70), Int8Weight(37, 70, device="meta")
    fresh.load_state_dict(rows.state_dict())
    assigned.load_state_dict(rows.state_dict(), assign=True)
    assert _same(fresh, weight) and torch.equal(assigned.packed, rows.packed)
    rows.save(tmp_path / "rows")
    assert _same(Int8Weight.load(tmp_path / "rows"), weight)
    assert _same(rows.to("cpu"), weight)


@pytest.mark.parametrize("change", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_a_model_s_dtype_leaves_the_scales_alone(change):
    weight = quantize_int8(_matrix(37, 70))
    model = torch.nn.Sequential(copy.deepcopy(weight))
    change(model)
    assert _same(model[0], weight) and model[0].scales.dtype == torch.float32


def test_state_of_another_shape_or_layout_is_refused():
    weight = quantize_int8(_matrix(37, 70))
    with pytest.raises(ValueError, match=r"Int8Weight: the state must be of shape \(37, 71\); got shape \(37, 70\)"):
        Int8Weight(37, 71).set_extra_state(weight.get_extra_state())
    with pytest.raises(ValueError, match=r"Int8Weight: the layout must be version 1; got version 9; quantise the weig"):
        weight.set_extra_state(torch.tensor([9, 37, 70]))


# --- in a file ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mmap", [False, True])
def test_file_round_trip(tmp_path, mmap):
    weight, path = quantize_int8(_matrix(100, 70)), tmp_path / "fc_in.safetensors"
    weight.save(path)
    assert os.listdir(tmp_path) == [path.name]
    found = Int8Weight.load(path, mmap=mmap)
    assert _same(found, weight)
    x = _matrix(5, 70, 1)
    assert torch.equal(int8_linear(x, found), int8_linear(x, weight))


def test_unaligned_values_are_read_as_well(engine):
    weight, x = quantize_int8(_matrix(100, 300)), _matrix(40, 300, 1)
    expected = int8_linear(x, weight, backend=engine)
    moved = torch.empty(weight.packed.numel() + 64, dtype=torch.int8)[4:][: weight.packed.numel()]
    weight.packed = moved.copy_(weight.packed.flatten()).view(weight.packed.shape)
    assert torch.equal(int8_linear(x, weight, backend=engine), expected)


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    quantize_int8(_matrix(40, 9)).save(path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        quantize_int8(_matrix(40, 9, 1)).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def _broken(tmp_path, change):
    path = tmp_path / "w.safetensors"
    weight = quantize_int8(_matrix(40, 70))
    weight.save(path)
    tensors = load_file(path)
    metadata = {"format": "limber_fast.Int8Weight", "layout": "1", "shape": "40 70"}
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    return path


FILES = {
    "foreign": (lambda t, m: m.update(format="pt"), r"the file must hold an Int8Weight; got format 'pt'"),
    "newer": (lambda t, m: m.update(layout="2"), r"the layout must be version 1; got version 2; quantise the weight a"),
    "no shape": (lambda t, m: m.pop("shape"), r"the shape must be two sizes, N and K; got None"),
    "shape of zero": (lambda t, m: m.update(shape="0 70"), r"the shape must be two sizes, N and K; got '0 70'"),
    "other shape": (lambda t, m: m.update(shape="40 200"), r"tensor 'packed' must be int8 \(2, 64, 32, 4\); got torch"),
    "other dtype": (lambda t, m: t.update(scales=t["scales"].double()), r"tensor 'scales' must be float32 \(40,\); go"),
    "missing": (lambda t, m: t.pop("column_sums"), r"tensor 'column_sums' must be int32 \(70,\); got no tensor of tha"),
}


@pytest.mark.parametrize("change, message", FILES.values(), ids=FILES)
def test_files_that_are_not_ours(tmp_path, change, message):
    path = _broken(tmp_path, change)
    with pytest.raises(ValueError, match=r"^Int8Weight.load: \S*w.safetensors: " + message) as error:
        Int8Weight.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 4, 40, 2000])
def test_truncated_files(tmp_path, keep):
    path = tmp_path / "w.safetensors"
    quantize_int8(_matrix(40, 70)).save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"the file must be a whole safetensors file; got .") as error:
        Int8Weight.load(path)
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        Int8Weight.load(tmp_path / "absent")
