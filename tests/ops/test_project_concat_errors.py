"""Every broken contract is one clear error: op, argument, contract, found, remedy."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from limber_fast import BackendUnavailable, project_concat

IMAGES, K, D, E, V, IMAGE = 2, 3, 5, 4, 10, 50
FEATURES, WEIGHT, BIAS, EMBEDDING = torch.randn(IMAGES, K, D), torch.randn(E, D), torch.randn(E), torch.randn(V, E)
IDS = torch.tensor([[1, IMAGE, IMAGE, IMAGE, 2], [IMAGE, IMAGE, IMAGE, 3, 4]])
CALL = {"features": FEATURES, "weight": WEIGHT, "bias": BIAS, "input_ids": IDS, "embedding": EMBEDDING,
        "image_token_id": IMAGE}  # fmt: skip


def _ids(*rows):
    return torch.tensor([[IMAGE if x == "i" else int(x) for x in row] for row in rows])


BAD_VALUES = {
    "two dimensions": (
        dict(features=FEATURES[0]),
        r"features must be \[n_images, k, D\]; got shape \(3, 5\); reshape it: features.reshape\(n_images, k, -1\)",
    ),
    "no rows per image": (dict(features=FEATURES[:, :0]), r"features must be .* with k and D of at least 1; got shape"),
    "meta": (dict(features=FEATURES.to("meta")), r"features must hold data; got a tensor on meta; materialise it"),
    "weight of other D": (dict(weight=WEIGHT[:, :3]), r"weight must be \[E, D\] with the D = 5 of features; got shape"),
    "weight as a vector": (dict(weight=BIAS), r"weight must be \[E, D\]; got shape \(4,\)"),
    "weight elsewhere": (dict(weight=WEIGHT.to("meta")), r"weight must be on the device of features, cpu; got meta"),
    "bias of other E": (dict(bias=BIAS[:3]), r"bias must be \[E\] with E = 4; got shape \(3,\); one value per row of"),
    "ids as a vector": (dict(input_ids=IDS[0]), r"input_ids must be \[B, S\]; got shape \(5,\); one row per prompt: i"),
    "embedding of other E": (dict(embedding=EMBEDDING[:, :3]), r"embedding must be \[V, E\] with the E = 4 of weight;"),
    "scales of other V": (
        dict(embedding=(EMBEDDING.to(torch.int8), torch.ones(V + 1))),
        r"embedding scales must be \[V\] with V = 10; got shape \(11,\); one value per row of embedding",
    ),
    "embedding with grad": (
        dict(embedding=EMBEDDING.clone().requires_grad_()),
        r"embedding must be frozen; got a tensor that requires grad; no gradient reaches it: detach it, or requires_gr",
    ),
    "dropout of one": (dict(dropout_p=1.0), r"dropout_p must lie in \[0, 1\); got 1.0; 0 turns it off"),
    "dropout of NaN": (dict(dropout_p=float("nan")), r"dropout_p must lie in \[0, 1\); got nan"),
    "negative seed": (dict(dropout_p=0.1, seed=-1), r"seed must lie in \[0, 2\^63\); got -1"),
    "two seeds": (dict(seed=torch.arange(2)), r"seed must be an integer or a tensor with one element; got shape \(2,"),
    "norm of other width": (
        dict(layer_norm=torch.nn.LayerNorm(3)),
        r"layer_norm must normalize over the E = 4 of weight; got shape \(3,\)",
    ),
    "norm weight of other width": (dict(layer_norm=(BIAS[:2], None, 0.1)), r"layer_norm weight must be \[E\] with E ="),
    "negative eps": (dict(layer_norm=(None, None, -1.0)), r"layer_norm eps must not be negative; got -1.0$"),
    "unknown backend": (dict(backend="tpu"), r"^project_concat: backend must be one of 'auto', .* got 'tpu'"),
    "broken run": (
        dict(input_ids=_ids("1iii2", "ii345")),
        r"^project_concat: input_ids must hold image tokens in runs of a multiple of k = 3; got a run of 2 in row 1; "
        r"each image takes k$",
    ),
    "run across rows": (dict(input_ids=_ids("12iii", "i1ii3")), r"got a run of 1 in row 1; each image takes k$"),
    "right number, wrong runs": (dict(input_ids=_ids("iiii1", "ii345")), r"got a run of 4 in row 0; each image"),
    "too few images": (
        dict(input_ids=_ids("1iii2", "12345")),
        r"input_ids must have a run of k = 3 image tokens for each of the 2 images in features; got runs for 1 images; "
        r"image_token_id is 50, the last image in row 0$",
    ),
    "too many images": (
        dict(input_ids=_ids("iii123", "iiiiii")),
        r"each of the 2 images in features; got runs for 3 images; image_token_id is 50, the last image in row 1$",
    ),
    "no images": (dict(image_token_id=51), r"each of the 2 images in .*; got runs for 0 images; image_token_id is 51$"),
    "id too large": (
        dict(input_ids=torch.where(IDS == 4, V, IDS)),
        r"input_ids must lie in \[0, V\) with V = 10, image_token_id = 50 apart; got 10 in row 1; they index rows of e",
    ),
    "negative id": (dict(input_ids=torch.where(IDS == 1, -100, IDS)), r"input_ids must lie in .*; got -100 in row 0; "),
}  # fmt: skip

BAD_KINDS = {
    "features of numbers": (dict(features=[1.0]), r"features must be a tensor \[n_images, k, D\]; got list; convert i"),
    "integer features": (dict(features=FEATURES.long()), r"features must be fp16, bf16, fp32 or fp64; got torch.int64"),
    "sparse weight": (dict(weight=WEIGHT.to_sparse()), r"weight must be a dense tensor \[E, D\]; got torch.sparse_coo"),
    "weight of other dtype": (
        dict(weight=WEIGHT.bfloat16()),
        r"weight must have the dtype of features, torch.float32; got torch.bfloat16; convert one: .*torch.autocast",
    ),
    "bias of other dtype": (dict(bias=BIAS.half()), r"bias must have the dtype of features, torch.float32; got torch."),
    "float ids": (dict(input_ids=IDS.float()), r"input_ids must be an integer tensor; got torch.float32; convert it"),
    "boolean ids": (dict(input_ids=IDS > 3), r"input_ids must be an integer tensor; got torch.bool"),
    "image token of a string": (dict(image_token_id="<image>"), r"image_token_id must be an integer; got str; convert"),
    "embedding module": (
        dict(embedding=torch.nn.Embedding(V, E)),
        r"embedding must be a tensor \[V, E\] or a pair \(int8 \[V, E\], scales \[V\]\); got Embedding",
    ),
    "int8 without scales": (
        dict(embedding=EMBEDDING.to(torch.int8)),
        r"embedding must be fp16, bf16, fp32 or fp64, or a pair of int8 \[V, E\] and its scales \[V\]; got torch.int8$",
    ),
    "scales without int8": (dict(embedding=(EMBEDDING, torch.ones(V))), r"its scales \[V\]; got torch.float32 with sc"),
    "integer scales": (
        dict(embedding=(EMBEDDING.to(torch.int8), torch.arange(V))),
        r"embedding scales must be fp16, bf16, fp32 or fp64; got torch.int64",
    ),
    "dropout of a string": (dict(dropout_p="a"), r"dropout_p must be a number; got str; convert it: float\(dropout_p"),
    "float seed": (dict(seed=1.5), r"seed must be an integer; got float; convert it: int\(seed\)"),
    "float seed tensor": (dict(seed=torch.ones(())), r"seed must be an integer tensor; got torch.float32"),
    "norm as a flag": (
        dict(layer_norm=True),
        r"layer_norm must be None, a torch.nn.LayerNorm\(E\) or a triple \(weight, bias, eps\); got bool$",
    ),
    "norm as a pair": (dict(layer_norm=(None, None)), r"layer_norm must be None, .* got 2 of them"),
    "norm weight of integers": (dict(layer_norm=(IDS[0, :4], None, 0.1)), r"layer_norm weight must be fp16, .*got tor"),
    "eps of a string": (dict(layer_norm=(None, None, "a")), r"layer_norm eps must be a number; got str"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", BAD_VALUES.values(), ids=BAD_VALUES)
def test_values_and_shapes(change, message):
    with pytest.raises(ValueError, match=message):
        project_concat(**(CALL | change))


@pytest.mark.parametrize("change, message", BAD_KINDS.values(), ids=BAD_KINDS)
def test_dtypes_and_kinds(change, message):
    with pytest.raises(TypeError, match=message):
        project_concat(**(CALL | change))


@pytest.mark.parametrize("row", range(3))
def test_token_errors_name_the_row(engine, row):
    ids = torch.zeros(3, 8, dtype=torch.int64)
    ids[:, 2:5] = IMAGE
    broken = ids.clone()
    broken[row, 5] = IMAGE
    for bad, found in ((broken, f"a run of 4 in row {row}"), (ids.index_put((torch.tensor(row),), torch.tensor(V)),
                                                              f"2 images;.* in row {2 - row // 2}")):  # fmt: skip
        with pytest.raises(ValueError, match=found):
            project_concat(**(CALL | {"features": torch.randn(3, K, D), "input_ids": bad, "backend": engine}))


def test_trainable_embedding_is_fine_where_nothing_is_trained():
    with torch.no_grad():
        project_concat(**(CALL | {"embedding": EMBEDDING.clone().requires_grad_()}))


def test_image_token_may_be_an_ordinary_id():
    ids = torch.where(IDS == IMAGE, 7, IDS)
    assert torch.equal(project_concat(**(CALL | {"input_ids": ids, "image_token_id": 7})), project_concat(**CALL))


def test_named_backend_never_falls_back():
    with pytest.raises(BackendUnavailable, match="project_concat: backend 'triton' cannot run this call"):
        project_concat(**CALL, backend="triton")
    double = {name: CALL[name].double() for name in ("features", "weight", "bias")}
    with pytest.raises(BackendUnavailable, match="cpu: computes in float32, bfloat16 and float16; got float64"):
        project_concat(**(CALL | double), backend="cpu")
    with pytest.raises(BackendUnavailable, match=r"cpu: gathers embeddings of float32, .* and int8; got float64"):
        project_concat(**(CALL | {"embedding": EMBEDDING.double()}), backend="cpu")


def test_second_derivative_is_refused(engine):
    weight = WEIGHT.clone().requires_grad_()
    out = project_concat(**(CALL | {"weight": weight}), backend=engine)
    (gradient,) = torch.autograd.grad(out.square().sum(), weight, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"^project_concat: its gradient cannot be differentiated again; .*reference"
    ):
        gradient.sum().backward()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_vmap_is_refused(requires_grad):
    weight = WEIGHT.clone().requires_grad_(requires_grad)
    with pytest.raises(RuntimeError, match=r"^project_concat: torch.vmap is not supported; input_ids has a batch"):
        torch.vmap(lambda x: project_concat(**(CALL | {"features": x, "weight": weight})))(FEATURES[None])


@pytest.mark.parametrize("leaf", [False, True])
@pytest.mark.parametrize("name", ["features", "weight", "bias"])
def test_forward_mode_is_refused(engine, name, leaf):
    x = CALL[name].clone().requires_grad_(leaf)
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match=r"^project_concat: forward-mode differentiation is not supported; .*refer"),
    ):
        project_concat(**(CALL | {name: forward_ad.make_dual(x, torch.ones_like(x))}), backend=engine)


def test_functional_transforms_are_refused():
    with pytest.raises(RuntimeError, match=r"^project_concat: torch.func transforms are not supported; use torch.auto"):
        torch.func.grad(lambda x: project_concat(**(CALL | {"weight": x})).sum())(WEIGHT)
