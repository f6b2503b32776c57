"""MAGMA's checkpoint: names and shapes of the released one, what is loaded against the same model in plain PyTorch."""

from __future__ import annotations

import dataclasses
import functools
import re

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("open_clip")
pytest.importorskip("transformers")

from gptj_cases import byte_tokenizer
from magma_model import Magma, released

from limber_fast import GPTJ, GPTJConfig, Limber
from limber_fast.models.encoders import encoder
from limber_fast.models.gptj_weights import shapes
from limber_fast.models.magma_files import magma_name

CONFIG = GPTJConfig(vocab_size=310, n_positions=96, n_embd=72, n_layer=3, n_head=3, rotary_dim=8, eos_token_id=0,
                    adapter_width=20)  # fmt: skip
WORDS = 301  # MAGMA embeds fewer ids than its head has rows


def small_encoder(seed=0):
    """open_clip's ModifiedResNet, as RN50x16 is one, of little width."""
    return encoder("open_clip:RN50", weights=None, seed=seed)


@pytest.fixture(scope="module")
def plain():
    trunk = small_encoder(seed=3).trunk
    return Magma(trunk, 2048, width=72, layers=3, heads=3, rotary=8, inner=20, words=WORDS, vocabulary=310).eval()


@pytest.fixture(scope="module")
def path(plain, tmp_path_factory):
    found = tmp_path_factory.mktemp("magma") / "mp_rank_00_model_states.pt"
    torch.save({"module": {name: x.half() if x.is_floating_point() else x for name, x in plain.state_dict().items()}},
               found)  # fmt: skip
    return found


@pytest.fixture(scope="module")
def exact(plain):
    """With the file's values, in float64."""
    exact = Magma(small_encoder().trunk, 2048, width=72, layers=3, heads=3, rotary=8, inner=20, words=WORDS,
                  vocabulary=310)  # fmt: skip
    exact.load_state_dict({
        name: x.half().double() if x.is_floating_point() else x for name, x in plain.state_dict().items()
    })  # fmt: skip
    return exact.double().eval()


def load(path, **options):
    return Limber.from_magma(path, byte_tokenizer(), encoder=small_encoder(), config=CONFIG, **options)


@pytest.fixture(scope="module")
def limber(path):
    return load(path, weights="float", dtype=torch.float32).eval()


def pixels_of(n):
    return torch.randn(n, 3, 224, 224, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def unmade(monkeypatch):
    """RN50x16 as `from_magma` makes it, without memory."""
    open_clip = pytest.importorskip("open_clip")
    monkeypatch.setattr(open_clip, "create_model", functools.partial(open_clip.create_model, device="meta"))
    with torch.device("meta"):
        return encoder("clip-random")


def load_released(path, found, trunk):
    torch.save({"module": {name: torch.empty(shape, device="meta", dtype=torch.float16)
                           for name, shape in found.items()}}, path)  # fmt: skip
    with torch.device("meta"):
        return Limber.from_magma(path, encoder=trunk, device="meta", weights="float", dtype=torch.float16)


def test_the_released_checkpoint_is_taken_whole(unmade, tmp_path):
    """Every name and shape at the released size; tensors without memory, so nothing is quantised."""
    found, path = released(), tmp_path / "mp_rank_00_model_states.pt"
    limber = load_released(path, found, unmade)
    assert {f"image_prefix.enc.{name}" for name in limber.encoder.trunk.state_dict()} == {
        name for name in found if name.startswith("image_prefix.enc.")
    }  # fmt: skip
    assert (limber.encoder.tokens, limber.projection.weight.shape) == (144, (4096, 3072))
    model = limber.language_model
    assert model.wte.shape == (50400, 4096) and model.config.adapter_width == 1024 and len(model.h) == 28
    needed = {magma_name(name) for name in shapes(model.config)}
    assert needed == {name for name in found if name.startswith("lm.") and not name.endswith(("tion.bias", "ed_bias"))}
    wrong = {
        "lm.transformer.h.27.mlp.1.adapter.2.bias": None, "image_prefix.enc.layer3.17.bn3.running_var": None,
        "image_prefix.ln.bias": (4095,), "lm.transformer.wte.weight": (50401, 4096),
        "lm.transformer.h.28.ln_1.weight": (4096,), "image_prefix.enc.attnpool.positional_embedding": (145, 3072),
    }  # fmt: skip
    for name, shape in wrong.items():
        changed = {key: x for key, x in found.items() if key != name} | ({} if shape is None else {name: shape})
        with pytest.raises(ValueError, match=re.escape(name)) as caught:
            load_released(path, changed, unmade)
        assert "\n" not in str(caught.value)


def test_the_default_encoder_is_rn50x16s_grid(unmade):
    """What LiMBeR's own row is cut from too."""
    assert (unmade.tokens, unmade.width) == (144, 3072)
    assert not any("attnpool" in name for name in unmade.trunk.state_dict())


def test_logits_are_the_plain_models(limber, exact):
    ids = limber.tokenizer("A picture of").input_ids
    pixels = pixels_of(2)
    with torch.no_grad():
        found, lengths = limber.inputs_embeds(limber.encode(pixels), [[_image(), ids], [ids, _image()]])
        hidden = limber.language_model.hidden_states(found, lengths)
        logits = limber.language_model.lm_head(hidden).split(lengths)
        soft = exact.soft_prompts(pixels.double())
        words = exact.lm.transformer["wte"](torch.tensor(ids))
        for out, parts in zip(logits, ([soft[0], words], [words, soft[1]]), strict=True):
            expected = exact.logits(torch.cat(parts))
            assert expected.std() > 0.5
            torch.testing.assert_close(out.double(), expected, atol=2e-4, rtol=2e-4)


def _image():
    from limber_fast.models.limber import IMAGE

    return IMAGE


def test_cached_generation_goes_through_the_adapters(limber, exact):
    pixels = pixels_of(1)
    found = limber.caption(pixels, "A picture of", max_new_tokens=6)
    ids = limber.tokenizer("A picture of").input_ids
    wte, said = exact.lm.transformer["wte"].weight, []
    x = torch.cat([exact.soft_prompts(pixels.double())[0], wte[ids]])
    for _ in range(6):
        said.append(int(exact.logits(x)[-1].argmax()))
        if said[-1] == 0 or said[-1] >= WORDS:
            break
        x = torch.cat([x, wte[said[-1:]]])
    assert len(said) > 1
    assert found[0].startswith(limber.tokenizer.decode(said, skip_special_tokens=True).strip())


def test_int8_is_near(path, limber):
    int8 = load(path, dtype=torch.float32)
    features = limber.encode(pixels_of(1))
    with torch.no_grad():
        found, plain = (
            x.language_model.hidden_states(*x.inputs_embeds(features, [[_image(), "abc"]])) for x in (int8, limber)
        )
    assert F.cosine_similarity(found, plain).min() > 0.999
    assert not torch.equal(found, plain)


def test_embeddings_that_the_file_lacks_are_zeros(limber):
    wte = limber.language_model.wte
    assert wte.shape == (310, 72) and not wte[WORDS:].any() and wte[:WORDS].any(1).all()
    assert limber.image_token_id == 310


def test_gradients_of_trained_adapters(path, exact):
    limber = load(path, weights="float", dtype=torch.float32)
    limber.language_model.train_adapters()
    limber.dropout = 0.0
    pixels, caption = pixels_of(1), "a red fox"
    with torch.no_grad():
        features = limber.encode(pixels)
    limber.train()(features, [caption]).backward()
    ids = torch.tensor([*limber.tokenizer(caption).input_ids, 0])
    for p in exact.lm.parameters():
        p.requires_grad_(True)
    soft = exact.image_prefix["ln"](exact.image_prefix["proj"](features[0].double()))
    logits = exact.logits(torch.cat([soft, exact.lm.transformer["wte"](ids)]))
    F.cross_entropy(logits[len(soft) - 1 : -1], ids).backward()
    for i, adapter in limber.language_model.adapters.items():
        theirs = exact.lm.transformer["h"][int(i)].mlp[1].adapter
        for ours, expected in ((adapter.down, theirs[0]), (adapter.up, theirs[2])):
            torch.testing.assert_close(ours.weight.grad.double(), expected.weight.grad, atol=1e-6, rtol=1e-3)
            torch.testing.assert_close(ours.bias.grad.double(), expected.bias.grad, atol=1e-6, rtol=1e-3)
    for p in exact.lm.parameters():
        p.requires_grad_(False)
    limber.language_model.train_adapters(False)
    assert not any(p.requires_grad for p in limber.language_model.parameters())


def test_checkpointing_changes_no_gradient(limber):
    model, features = limber.language_model, torch.randn(2, 49, 2048)
    model.train_adapters()
    grads = []
    for again in (False, True):
        model.gradient_checkpointing = again
        limber.zero_grad()
        limber(features, ["ab", "cde"]).backward()
        grads.append([p.grad.clone() for p in (limber.projection.weight, *model.adapters.parameters())])
    model.gradient_checkpointing = False
    model.train_adapters(False)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_saved_with_the_encoder_and_the_adapters(limber, path, tmp_path):
    limber.save_pretrained(tmp_path / "limber")
    limber.language_model.save_pretrained(tmp_path / "lm")
    pixels = pixels_of(1)
    expected = limber.caption(pixels, max_new_tokens=5)
    whole = GPTJ.from_pretrained(tmp_path / "lm")
    assert whole.config.adapter_width == 20
    again = Limber.from_pretrained(tmp_path / "limber", whole, limber.tokenizer)
    assert again.caption(pixels, max_new_tokens=5) == expected
    both = (x.language_model.adapters.parameters() for x in (again, limber))
    for a, b in zip(*both, strict=True):
        assert torch.equal(a, b) and not a.requires_grad
    assert torch.equal(again.encoder.trunk.conv1.weight, limber.encoder.trunk.conv1.weight)
    assert len(list((tmp_path / "limber").iterdir())) == 2

    bare = GPTJ(dataclasses.replace(CONFIG, adapter_width=None), weights="float", dtype=torch.float32)
    for name, x in bare.named_buffers():
        x.copy_(dict(limber.language_model.named_buffers())[name])
    again = Limber.from_pretrained(tmp_path / "limber", bare, limber.tokenizer)
    assert bare.config.adapter_width == 20 and again.caption(pixels, max_new_tokens=5) == expected


def test_bad_files_are_one_line(path, tmp_path):
    state = dict(torch.load(path, weights_only=True)["module"])
    head, wte = "lm.lm_head.bias", "lm.transformer.wte.weight"
    adapter = "lm.transformer.h.1.mlp.1.adapter.0.weight"
    proj, conv = "image_prefix.proj.weight", "image_prefix.enc.layer4.2.conv3.weight"
    cases = [
        (head, None, rf"tensor '{head}' must be \(310,\); got no tensor of that name"),
        (adapter, torch.zeros(18, 72), rf"tensor '{adapter}' must be \(20, 72\); got shape \(18, 72\)"),
        (adapter, "x", rf"tensor '{adapter}' must be a tensor; got str"),
        (wte, torch.zeros(311, 72), rf"tensor '{wte}' must be \[1 to 310, 72\]; got shape \(311, 72\)"),
        (wte, torch.zeros(301, 70), rf"tensor '{wte}' must be .*; got shape \(301, 70\)"),
        (proj, torch.zeros(72, 2560), rf"tensor '{proj}' must be \(72, 2048\); got shape \(72, 2560\)"),
        (conv, None, rf"the file must hold '{conv}'"),
        ("lm.transformer.h.0.attn.adapter.0.weight", torch.zeros(1), "must hold MAGMA's tensors alone; got 'lm.*attn"),
    ]
    for name, value, says in cases:
        changed = {key: x for key, x in state.items() if key != name} | ({} if value is None else {name: value})
        torch.save(changed, tmp_path / "bad.pt")
        with pytest.raises(ValueError, match=says) as caught:
            load(tmp_path / "bad.pt", weights="float")
        assert "\n" not in str(caught.value) and str(tmp_path / "bad.pt") in str(caught.value)
    nan = state[adapter].clone()
    (tmp_path / "bad.pt").write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="be a whole file of tensors alone"):
        load(tmp_path / "bad.pt")
    weight = "lm.transformer.h.0.mlp.0.c_fc.weight"
    nan = state[weight].clone()
    nan[3, 5] = torch.nan
    torch.save(state | {weight: nan}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=weight):
        load(tmp_path / "bad.pt")
