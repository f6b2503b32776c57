"""The Triton kernels of info_nce behind the public op, interpreted, as executed PTX and on a GPU, against float64."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import cases
import pytest
import torch
from torch import Tensor

from gpu.launching import ENGINES, on, on_engines, running, send_to_triton
from limber_fast import info_nce
from limber_fast.backends.triton import device
from limber_fast.kernels import info_nce_bwd_launch, info_nce_launch
from limber_fast.kernels.info_nce_launch import tma_can_read
from limber_fast.reference.info_nce import info_nce as reference


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, poisoned: None) -> str:
    """CPU tensors go to the Triton backend, whose launches run on the engine; its outputs are NaN beforehand."""
    send_to_triton(monkeypatch, "info_nce", request.param)
    monkeypatch.setattr(info_nce_launch, "PROGRAMS", 1)  # strips of several tiles
    return request.param


@dataclass(frozen=True)
class Call:
    """One call of the op: kind of data, shape, dtype, options of the op; `gap` columns of NaN after every tower row.

    scaled: by how much the images are multiplied, short: by how much one of them is. scale_by: by how much the logit
    scale is.
    """

    data: str = "unit"
    shape: tuple[int, int, int] = (130, 130, 40)
    dtype: torch.dtype = torch.bfloat16
    options: dict = field(default_factory=dict)
    extra: int = 0
    scaled: float = 1.0
    short: float = 1.0
    scale_by: float = 1.0
    gap: int = 0

    def inputs(self) -> list[Tensor]:
        n, m, d = self.shape
        image, text, scale = cases.towers(self.data, n, m, d, self.dtype)
        image = image * self.scaled
        image[5:6] *= self.short
        if self.gap:
            image, text = (torch.nn.functional.pad(x, (0, self.gap), value=torch.nan)[:, :d] for x in (image, text))
        inputs = [image, text, torch.tensor(scale * self.scale_by), torch.tensor(-2.0)]
        return [*inputs, cases._directions(self.extra, d, 77).to(self.dtype)] if self.extra else inputs


def _ids(n: int, seed: int) -> Tensor:
    return torch.randint(0, n // 3, (n,), generator=torch.Generator().manual_seed(seed))


CALLS = {
    "clip": Call(),
    "tma": Call(shape=(200, 200, 72)),
    "fp16": Call(dtype=torch.float16, shape=(130, 130, 64)),
    "fp32": Call(dtype=torch.float32),
    "one": Call(shape=(1, 1, 7)),
    "below": Call("below"),
    "opposed": Call("opposed", options={"normalize": True}),
    "wild": Call("wild"),
    "peaks": Call("peaks"),
    "offset": Call("offset", dtype=torch.float32),
    "negative": Call(scale_by=-1.0),
    "converged": Call("converged", dtype=torch.float32),
    "rectangular": Call(shape=(70, 200, 64), options={"labels": cases.labels(70, 200), "symmetric": False}),
    "permuted": Call(options={"labels": cases.permutation(130)}),
    "ids": Call(options={"ids": _ids(130, 1)}),
    "extra": Call(extra=150),
    "smoothing": Call(options={"label_smoothing": 0.1}, extra=20),
    "normalize": Call(options={"normalize": True}, scaled=3.0),
    "normalize_fp16": Call(options={"normalize": True}, scaled=3.0, dtype=torch.float16),
    "normalize_short": Call(options={"normalize": True}, scaled=3.0, short=1e-3, dtype=torch.float16),
    "weights": Call(options={"weights": torch.linspace(0, 2, 130)}),
    "siglip": Call(options={"variant": "sigmoid"}, extra=20),
}


def _gradients(function, call: Call, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in call.inputs()]
    extra = {"extra_negatives": leaves[4]} if call.extra else {}
    rows = function(*leaves[:3], logit_bias=leaves[3], reduction="none", **call.options, **extra)
    rows = rows[0] if isinstance(rows, tuple) else rows
    found = torch.autograd.grad(rows.mean(), leaves)
    names = ("image", "text", "logit_scale", "logit_bias", "extra_negatives")
    return {"loss": rows.detach(), **dict(zip(names, found, strict=False))}


def _dense(image, text, scale, *, logit_bias, extra_negatives=None, reduction, **options):
    """Eager PyTorch in the towers' dtype: the yardstick. Its products round to 16 bits, its losses do not."""
    candidates = text if extra_negatives is None else torch.cat([text, extra_negatives])
    if options.get("normalize"):
        image, candidates = (torch.nn.functional.normalize(x, dim=1) for x in (image, candidates))
    logits = ((scale * image) @ candidates.T).float()
    identity = torch.eye(candidates.shape[0])
    unit = options.get("weights")
    rest = {k: v for k, v in options.items() if k not in ("normalize", "weights")}
    m = text.shape[0]
    rest |= {} if extra_negatives is None else {"extra_negatives": identity[m:]}
    return reference(logits, identity[:m], 1.0, logit_bias=logit_bias, reduction=reduction, weights=unit, **rest)


KEPT = ("tma", "fp32", "opposed", "wild", "ids", "normalize", "siglip")


@on_engines("name", CALLS, kept=KEPT)
def test_against_float64(engine, name):
    call = CALLS[name]
    with running(engine):
        found = _gradients(on(engine, info_nce), call)
    true, eager = _gradients(reference, call, torch.float64), _gradients(_dense, call)
    fp32 = max(cases.FLOOR[torch.float32], 2**-24 * call.inputs()[2].item())
    for output in ("loss", "image", "text", *(["extra_negatives"] if call.extra else [])):
        floor = fp32 if output == "loss" else max(cases.FLOOR[call.dtype], fp32)
        for error, of_eager in zip(
            cases.errors(found[output], true[output]), cases.errors(eager[output], true[output]), strict=True
        ):
            assert error <= 2 * of_eager + floor, (output, error, of_eager)
    largest = max((call.inputs()[0].double() @ call.inputs()[1].double().T).abs().max(), true["logit_scale"].abs())
    slack = max(cases.FLOOR[call.dtype], fp32) * largest
    of_eager = (eager["logit_scale"] - true["logit_scale"]).abs()
    assert (found["logit_scale"] - true["logit_scale"]).abs() <= 2 * of_eager + slack


@pytest.mark.parametrize("name", CALLS)
def test_tiles_of_tensor_memory(name, monkeypatch, poisoned):
    """Interpreted: nothing here executes the code of sm_100."""
    send_to_triton(monkeypatch, "info_nce", "interpreted")
    monkeypatch.setattr(info_nce_launch, "PROGRAMS", 1)
    monkeypatch.setattr(device, "chip", lambda where: ((10, 0), 3))
    test_against_float64("interpreted", name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_without_length_leave_the_others_theirs(dtype, monkeypatch, poisoned):
    """fp16 has no room for a gradient over 1e-12 beside the others'."""
    send_to_triton(monkeypatch, "info_nce", "interpreted")
    call = Call(options={"normalize": True}, scaled=3.0, short=0.0, dtype=dtype)
    with running("interpreted"):
        found = _gradients(info_nce, call)
    true = _gradients(reference, call, torch.float64)
    whole = replace(call, short=1.0)  # a row of zeros is nothing that eager has an error for
    of_eager, of_whole = _gradients(_dense, whole), _gradients(reference, whole, torch.float64)
    others = torch.arange(len(true["image"])) != 5
    for output, rows in (("image", others), ("text", slice(None))):
        error, allowed = (
            max(cases.errors(x[output][rows], y[output][rows])) for x, y in ((found, true), (of_eager, of_whole))
        )
        assert error <= 2 * allowed + cases.FLOOR[dtype], output


@on_engines("name", ("clip", "extra", "siglip"), kept=("clip", "siglip"))
def test_statistics(engine, name):
    call = CALLS[name]
    image, text, scale, bias, *extra = call.inputs()
    more = {"extra_negatives": extra[0]} if extra else {}
    with running(engine):
        _, stats = on(engine, info_nce)(image, text, scale, logit_bias=bias, return_stats=True, **call.options, **more)
    more = {key: x.double() for key, x in more.items()}
    _, true = reference(image.double(), text.double(), scale.double(), logit_bias=bias.double(), **call.options, **more)
    for field_name in ("image_log_sum_exp", "text_log_sum_exp", "loss_per_row", "image_accuracy", "text_accuracy"):
        found, expected = getattr(stats, field_name), true[field_name]
        assert (found is None) == (expected is None), field_name
        if found is not None:
            assert max(cases.errors(found, expected)) < 2e-6, field_name


@on_engines("tower", (0, 1), kept=(1,))
def test_nan_reaches_what_it_reaches_in_eager(engine, tower):
    image, text, _ = cases.towers("unit", 70, 70, 40, torch.float32)
    inputs = [image.clone(), text.clone()]
    inputs[tower][33, 3] = torch.nan
    leaves = [x.requires_grad_() for x in inputs]
    with running(engine):
        loss = on(engine, info_nce)(*leaves, 9.0, reduction="none", symmetric=False)
        found = torch.autograd.grad(loss.sum(), leaves)
    dense = cases.eager_info_nce(*leaves, torch.tensor(9.0), symmetric=False)
    for x, y in zip((loss, *found), (dense, *torch.autograd.grad(dense.sum(), leaves)), strict=True):
        assert torch.equal(x.isnan(), y.isnan())


def test_rows_that_overlap_are_read_without_descriptors(engine):
    """Their stride is less than their width, which no descriptor takes."""
    image, text, scale = cases.towers("unit", 70, 70, 72, torch.bfloat16)
    same, overlapping = (text.flatten().as_strided((70, 72), (stride, 1)) for stride in (0, 64))
    assert tma_can_read(image, text) and not tma_can_read(image, same) and not tma_can_read(image, overlapping)
    with running(engine):
        found = on(engine, info_nce)(image, same, scale)
    true, _ = reference(image.double(), same.double(), scale)
    torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=0)


@pytest.mark.parametrize("tiles", [(128, 1), (128, 2), (128, 3), (256, 2)], ids=str)
@pytest.mark.parametrize("of", ["clip", "fp32", "extra", "siglip"])
def test_gradients_of_any_macro_tiles(monkeypatch, poisoned, tiles, of):
    """One or several side by side, cut off at the ends: sums over them are taken in one order."""
    call = {
        "clip": Call(shape=(330, 330, 40)),
        "fp32": Call(shape=(330, 330, 40), dtype=torch.float32),
        "extra": Call(shape=(300, 700, 40), options={"labels": cases.labels(300, 700), "symmetric": False}, extra=150),
        "siglip": Call(shape=(300, 700, 40), options={"variant": "sigmoid", "labels": cases.labels(300, 700)}),
    }[of]
    send_to_triton(monkeypatch, "info_nce", "interpreted")
    monkeypatch.setattr(info_nce_bwd_launch, "macro_tiles", lambda *_: tiles)
    with running("interpreted"):
        found = _gradients(info_nce, call)
    true, eager = _gradients(reference, call, torch.float64), _gradients(_dense, call)
    for name in ("image", "text", *(["extra_negatives"] if call.extra else [])):
        for error, of_eager in zip(
            cases.errors(found[name], true[name]), cases.errors(eager[name], true[name]), strict=True
        ):
            assert error <= 2 * of_eager + cases.FLOOR[call.dtype], (name, error, of_eager)


@on_engines("frozen", ("image", "text"), kept=("text",))
def test_frozen_tower(engine, frozen):
    image, text, scale = cases.towers("unit", 70, 70, 40, torch.bfloat16)
    image, text = image.clone().requires_grad_(frozen != "image"), text.clone().requires_grad_(frozen != "text")
    live = text if frozen == "image" else image
    with running(engine):
        (alone,) = torch.autograd.grad(on(engine, info_nce)(image, text, scale), live)
        leaves = [x.detach().requires_grad_() for x in (image, text)]
        both = torch.autograd.grad(on(engine, info_nce)(*leaves, scale), leaves)
    assert torch.equal(alone, both[frozen == "image"])


def test_same_bits_on_every_run_and_any_number_of_programs(engine, monkeypatch):
    call, results = CALLS["extra"], []
    for programs in (1, 3, 64):
        send_to_triton(monkeypatch, "info_nce", engine, programs)
        with running(engine):
            results.append(_gradients(on(engine, info_nce), call))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)
