"""What Limber saves and loads: its own folder, whole or not at all, and LiMBeR's released projection."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from gptj_cases import D, features_of, limber_of, transformers_gptj

from limber_fast import GPTJ, GPTJConfig, Limber
from limber_fast.models.limber_model import IMAGE


@pytest.fixture
def limber():
    return limber_of(transformers_gptj("tiny"))


def test_saves_what_was_trained(limber, tmp_path):
    limber.save_pretrained(tmp_path / "map")
    again = Limber.from_pretrained(tmp_path / "map", limber.language_model, limber.tokenizer)
    assert torch.equal(again.projection.weight, limber.projection.weight) and again.encoder is None
    features = features_of(2)
    assert again.caption(features, max_new_tokens=6) == limber.caption(features, max_new_tokens=6)
    data = tmp_path / "map" / json.loads((tmp_path / "map" / "limber.json").read_text())["file"]
    assert {p.name for p in (tmp_path / "map").iterdir()} == {"limber.json", data.name}
    whole = data.read_bytes()
    data.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=r"limber-.*\.safetensors: the file must be a state dict"):
        Limber.from_pretrained(tmp_path / "map", limber.language_model)
    (tmp_path / "map" / "limber.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match=r"limber\.json: format must be"):
        Limber.from_pretrained(tmp_path / "map", limber.language_model)


def test_a_save_is_whole_or_did_not_happen(limber, tmp_path, monkeypatch):
    """Map and settings change together, in one rename; a failure at any moment before leaves the old folder."""
    from limber_fast.models import limber_files

    folder, replaced = tmp_path / "map", limber_files.replace
    limber.save_pretrained(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    limber.projection.bias.data += 1

    def failing(name):
        def replace(path, data):
            if path.name.endswith(name):
                raise OSError("no space left on device")
            replaced(path, data)

        return replace

    for name in (".safetensors", ".json"):
        monkeypatch.setattr(limber_files, "replace", failing(name))
        with pytest.raises(OSError, match="no space"):
            limber.save_pretrained(folder)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    monkeypatch.setattr(limber_files, "replace", replaced)
    limber.save_pretrained(folder)
    assert len(list(folder.iterdir())) == 2
    again = Limber.from_pretrained(folder, limber.language_model)
    assert torch.equal(again.projection.bias, limber.projection.bias)
    found = json.loads((folder / "limber.json").read_text())
    (folder / "limber.json").write_text(json.dumps(found | {"file": "../limber.safetensors"}))
    with pytest.raises(ValueError, match="file must be the name of a file in the same folder"):
        Limber.from_pretrained(folder, limber.language_model)


def test_weights_of_the_encoder_by_a_relative_path(limber, tmp_path, monkeypatch):
    """A folder loads from wherever it is asked for."""
    pytest.importorskip("timm")
    from limber_fast.models.encoders import encoder

    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    torch.save(encoder("timm:test_resnet", weights=None, seed=5).trunk.state_dict(), "weights.pt")
    found = encoder("timm:test_resnet", weights="weights.pt")
    Limber(found, limber.language_model, limber.tokenizer).save_pretrained("map")
    saved = json.loads((tmp_path / "here" / "map" / "limber.json").read_text())["encoder"]
    assert saved["weights"] == str(tmp_path / "here" / "weights.pt") == found.weights
    monkeypatch.chdir(tmp_path / "there")
    again = Limber.from_pretrained("../here/map", limber.language_model, limber.tokenizer)
    assert all(map(torch.equal, again.encoder.parameters(), found.parameters()))


@pytest.mark.parametrize(
    ("name", "width"), [("clip_linear", 3072), ("beit_ft_linear", 1024), ("nfrn50_4096_linear", 2048)]
)
def test_released_projections_at_their_own_size(tmp_path, name, width):
    """LiMBeR's folders and shapes: an encoder's width to GPT-J's 4096; the file may be in half precision."""
    config = GPTJConfig(n_layer=1, n_embd=4096, n_head=16, n_inner=64, vocab_size=64, n_positions=256)
    limber = Limber(None, GPTJ.from_config(config), width=width)
    path = tmp_path / "limber_weights" / name / "proj.ckpt"
    path.parent.mkdir(parents=True)
    state = {"weight": torch.randn(4096, width).half(), "bias": torch.randn(4096).half()}
    torch.save(state, path)
    limber.load_projection(path)
    assert torch.equal(limber.projection.weight, state["weight"].float())
    assert torch.equal(limber.projection.bias, state["bias"].float())
    features = torch.randn(2, {3072: 144, 1024: 196, 2048: 1}[width], width)
    x, lengths = limber.inputs_embeds(features, [[IMAGE], [IMAGE, [5, 6]]])
    expected = features.bfloat16() @ state["weight"].bfloat16().T + state["bias"].bfloat16()
    assert lengths == [features.shape[1], features.shape[1] + 2] and x.shape == (sum(lengths), 4096)
    torch.testing.assert_close(x[: lengths[0]].float(), expected[0].float(), rtol=0.02, atol=1.0)


def test_released_projection(limber, tmp_path):
    path = tmp_path / "proj.ckpt"
    state = {"weight": torch.randn(84, D), "bias": torch.randn(84)}
    torch.save(state, path)
    limber.load_projection(path)
    assert torch.equal(limber.projection.weight, state["weight"]) and torch.equal(limber.projection.bias, state["bias"])
    before = limber.projection.weight.clone()
    bad = {
        "weight and bias; got bias, proj.weight": {"proj.weight": state["weight"], "bias": state["bias"]},
        r"'weight' must be \(84, 24\)": {**state, "weight": torch.zeros(84, D + 1)},
        r"'bias' must be \(84,\)": {**state, "bias": torch.zeros(83)},
    }
    for says, found in bad.items():
        torch.save(found, path)
        with pytest.raises(ValueError, match=says):
            limber.load_projection(path)
    path.write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match="state dict that holds tensors alone"):
        limber.load_projection(path)
    assert torch.equal(limber.projection.weight, before)
