"""Weights of open_clip models from files: OpenAI's TorchScript archives, and files that are something else."""

import json
import pickle
import zipfile

import pytest
import torch

pytest.importorskip("open_clip")

import open_clip
from safetensors.torch import save_file

from limber_fast.files import load_state
from limber_fast.models import encoders
from limber_fast.models.encoders import encoder, open_clip_model

pytestmark = pytest.mark.filterwarnings("ignore")  # of tracing, which OpenAI used and torch deprecates

SIZES = {"input_resolution": 64, "context_length": 8, "vocab_size": 32}
TEXT = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
MODELS = {
    "tiny-RN": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    "tiny-ViT": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "tiny-ViT-2": {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
}


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory):
    """CLIPs of small size under names of their own."""
    folder = tmp_path_factory.mktemp("models")
    for name, vision in MODELS.items():
        config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT}
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")


def archive(path, name="tiny-RN", seed=3):
    """As OpenAI made its files: traced in half precision, with three sizes as buffers; (model, its state)."""
    torch.manual_seed(seed)
    model = open_clip.create_model(name, precision="fp16", force_quick_gelu=True).eval()
    state = dict(model.state_dict())
    for key, value in SIZES.items():
        vars(model).pop(key, None)
        model.register_buffer(key, torch.tensor(value))
    size = MODELS[name]["image_size"]
    example = torch.zeros(1, 3, size, size).half(), torch.ones(1, 8, dtype=torch.long)
    torch.jit.trace(model, example, check_trace=False).save(path)
    return model, state


def test_openais_archive(tmp_path, monkeypatch):
    path = tmp_path / "RN.pt"
    _, state = archive(path)
    assert set(SIZES) < set(load_state(path)) and state["visual.conv1.weight"].dtype == torch.float16
    found, _ = open_clip_model("open_clip:tiny-RN", "tiny-RN", path)
    assert found.state_dict().keys() == state.keys()
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == state[name].float().dtype or tensor.dtype == torch.long
        assert torch.equal(tensor, state[name].to(tensor.dtype)), name
    monkeypatch.setitem(encoders.NAMED, "clip", ("open_clip:tiny-RN", "openai"))
    features = encoder("clip", weights=path)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found.visual.attnpool = torch.nn.Identity()
        torch.testing.assert_close(features(images), found.visual(images).flatten(2).mT)


def test_openais_activation(tmp_path):
    model, state = archive(tmp_path / "ViT.pt", "tiny-ViT")
    torch.save(state, tmp_path / "plain.pt")
    quick, _ = open_clip_model("open_clip:tiny-ViT", "tiny-ViT", tmp_path / "ViT.pt")
    plain, _ = open_clip_model("open_clip:tiny-ViT", "tiny-ViT", tmp_path / "plain.pt")
    images, texts = torch.randn(2, 3, 32, 32), torch.randint(1, 32, (2, 8))
    with torch.no_grad():
        model = model.float()
        torch.testing.assert_close(quick.encode_image(images), model.encode_image(images), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(quick.encode_text(texts), model.encode_text(texts), rtol=1e-3, atol=1e-3)
        assert not torch.equal(plain.encode_text(texts), quick.encode_text(texts))


def test_the_activation_of_a_set_by_its_name(tmp_path, monkeypatch):
    """ViT-B-32's of OpenAI and of LAION differ in it; the file takes the place of the download."""
    state = open_clip.create_model("ViT-B-32").state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *a, **k: str(tmp_path / "weights.safetensors"))
    for weights, quick in (("openai", True), ("laion2b_e16", False)):
        found, _ = open_clip_model("open_clip:ViT-B-32", "ViT-B-32", weights)
        kinds = {type(block.mlp.gelu).__name__ for block in found.visual.transformer.resblocks}
        assert kinds == {"QuickGELU" if quick else "GELU"}, weights


def test_an_archive_is_read_as_torch_reads_it(tmp_path):
    """Tied, strided and empty tensors, nested modules, lists."""

    class Part(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 3).t())
            self.sizes = [1, 2, 3]
            self.register_buffer("empty", torch.zeros(0, 2))

        def forward(self, x):
            return x @ self.weight.t() + self.sizes[0]

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = torch.nn.Sequential(Part(), torch.nn.Linear(4, 2))
            self.tied = self.parts[0].weight

        def forward(self, x):
            return self.parts(x)

    whole = Whole()
    torch.jit.script(whole).save(tmp_path / "whole.pt")
    found, expected = load_state(tmp_path / "whole.pt"), whole.state_dict()
    assert found.keys() == expected.keys() and found["parts.0.weight"].stride() == (1, 3)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)
    assert found["tied"].data_ptr() == found["parts.0.weight"].data_ptr()


def test_nothing_of_an_archive_is_run(tmp_path, monkeypatch):
    """torch.jit.load runs its __setstate__, and this one writes a file."""

    class Writer(torch.nn.Module):
        def forward(self, x):
            return x

        @torch.jit.export
        def __getstate__(self):
            return torch.ones(2), self.training

        @torch.jit.export
        def __setstate__(self, state: tuple[torch.Tensor, bool]):
            self.training = state[1]
            torch.save(state[0], "written.bin")

    monkeypatch.chdir(tmp_path)
    torch.jit.script(Writer()).save("writer.pt")
    with pytest.raises(ValueError, match=r"writer\.pt: the file must .*; got a TorchScript archive whose own code"):
        load_state("writer.pt")
    assert [x.name for x in tmp_path.iterdir()] == ["writer.pt"]
    torch.jit.load("writer.pt")
    assert (tmp_path / "written.bin").exists()


def in_disguise(path):
    """A TorchScript archive whose pickle calls a function."""
    archive(path)
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(name, b"cos\nsystem\n(S'true'\ntR." if name.endswith("/data.pkl") else data)


def cut(path, write):
    write()
    path.write_bytes(path.read_bytes()[:-9])


def bad_files():
    state = {"visual.conv1.weight": torch.zeros(3)}
    whole = "be a state dict that holds tensors alone"
    return {
        "truncated.safetensors": (lambda path: cut(path, lambda: save_file(state, path)), whole),
        "text.safetensors": (lambda path: path.write_text("weights\n"), whole),
        "text.pt": (lambda path: path.write_text("weights\n"), whole),
        "pickle.pt": (lambda path: path.write_bytes(pickle.dumps(print)), whole),
        "pickle.safetensors": (lambda path: path.write_bytes(pickle.dumps(print)), whole),
        "truncated.pt": (lambda path: cut(path, lambda: torch.save(state, path)), whole),
        "empty.pt": (lambda path: path.write_bytes(b""), whole),
        "cut_archive.pt": (lambda path: cut(path, lambda: archive(path)), whole),
        "archive.pt": (in_disguise, f"{whole}; got a TorchScript archive that asks for os.system"),
        "list.pt": (lambda path: torch.save([1], path), "hold a state dict; got list"),
        "numbers.pt": (lambda path: torch.save({"a": 1}, path), "hold a state dict; got 'a': int"),
        "none.pt": (lambda path: torch.save({}, path), "hold a state dict; got nothing"),
        "other.pt": (lambda path: torch.save({"fc.weight": torch.zeros(2)}, path),
                     "hold the weights of open_clip:tiny-ViT alone; got 'fc.weight'"),
        "part.pt": (lambda path: torch.save({"logit_scale": torch.zeros(1)}, path),
                    "hold 'positional_embedding'; got 1 other tensors"),
        "RN.pt": (lambda path: archive(path), "hold 'visual.class_embedding'; got 142 other tensors"),
        "deeper.pt": (lambda path: torch.save(open_clip.create_model("tiny-ViT-2").state_dict(), path),
                      "alone; got 'visual.transformer.resblocks.1.ln_1.weight'"),
        "big.pt": (lambda path: torch.save({"positional_embedding": torch.zeros(8, 24)}, path),
                   "hold the weights of open_clip:tiny-ViT; got text pos_embed width changed!"),
    }  # fmt: skip


@pytest.mark.parametrize("name", bad_files())
def test_a_file_that_is_something_else_is_one_line(tmp_path, name):
    make, says = bad_files()[name]
    make(tmp_path / name)
    with pytest.raises(ValueError) as error:
        encoder("open_clip:tiny-ViT", weights=tmp_path / name)
    found = str(error.value)
    assert found.startswith(f"{tmp_path / name}: the file must ") and says in found and "\n" not in found


def test_what_open_clip_stores_otherwise(tmp_path):
    """Its training's checkpoints, of several processes, and position embeddings of another grid."""
    state = open_clip.create_model("tiny-ViT").state_dict()
    torch.save({"state_dict": {f"module.{name}": x for name, x in state.items()}, "epoch": 3}, tmp_path / "epoch_3.pt")
    found, _ = open_clip_model("open_clip:tiny-ViT", "tiny-ViT", tmp_path / "epoch_3.pt")
    assert all(torch.equal(x, state[name]) for name, x in found.state_dict().items())
    larger = {**state, "visual.positional_embedding": torch.ones(26, 16)}
    save_file(larger, tmp_path / "larger.safetensors")
    found, _ = open_clip_model("open_clip:tiny-ViT", "tiny-ViT", tmp_path / "larger.safetensors")
    torch.testing.assert_close(found.visual.positional_embedding.data, torch.ones(17, 16))
