"""Files that are not what they should be: one line that says what was found, nothing loaded, nothing executed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from limber_fast import GPTJ
from limber_fast.models import gptj_files

ONE, MANY = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def spoilt(folders, tmp_path):
    """A copy of a layout, with one thing changed."""

    def make(layout: str, change) -> Path:
        folder = tmp_path / "spoilt"
        shutil.copytree(folders[layout], folder)
        change(folder)
        return folder

    return make


def rewrite(change, file: str = ONE):
    def apply(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file)

    return apply


def edit_json(file: str, change):
    def apply(folder: Path) -> None:
        found = json.loads((folder / file).read_text())
        change(found)
        (folder / file).write_text(json.dumps(found))

    return apply


def to_nan(tensors):
    tensors["transformer.h.1.mlp.fc_in.weight"][3, 5] = torch.nan


def edit_config(**values):
    return edit_json("config.json", lambda found: found.update(values))


def truncate(file: str, size: int):
    return lambda folder: os.truncate(folder / file, size)


K_PROJ, BIN = "transformer.h.1.attn.k_proj.weight", "pytorch_model.bin"
NOT_WHOLE = r"pytorch_model.bin: the file must be a whole file of tensors alone, as torch.save writes it; got .+"
BAD = {
    "a tensor is missing": (
        "one", rewrite(lambda x: x.pop(K_PROJ)), rf"tensor '{K_PROJ}' must be \(84, 84\); got no tensor of that name",
    ),
    "a tensor too many": (
        "one", rewrite(lambda x: x.update({"transformer.h.3.ln_1.weight": torch.ones(84)})),
        r"must hold GPT-J's tensors alone; got 'transformer.h.3.ln_1.weight'",
    ),
    "another shape": (
        "one", rewrite(lambda x: x.update({K_PROJ: torch.ones(84, 80)})),
        rf"tensor '{K_PROJ}' must be \(84, 84\); got shape \(84, 80\)",
    ),
    "integers": (
        "one", rewrite(lambda x: x.update({K_PROJ: torch.ones(84, 84).long()})),
        rf"tensor '{K_PROJ}' must be floating point; got torch.int64",
    ),
    "NaN": ("one", rewrite(to_nan), r"transformer.h.1.mlp.fc_in.weight.*weight must be finite; got NaN or Inf in r"),
    "truncated": ("one", truncate(ONE, 10_000), r"model.safetensors: the file must be a whole safetensors file; g"),
    "a pickle named safetensors": (
        "one", lambda folder: (folder / ONE).write_bytes(pickle.dumps({"transformer.wte.weight": [1.0]})),
        r"model.safetensors: the file must be a whole safetensors file; got .+",
    ),
    "a missing shard": (
        "shards", lambda folder: next(folder.glob("model-00002*")).unlink(), r"shard 'model-00002.*' must be in the sa",
    ),
    "a truncated zip": ("bin", truncate(BIN, 20_000), NOT_WHOLE),
    "a truncated pickle": ("old bin", truncate(BIN, 20_000), NOT_WHOLE),
    "an empty bin": ("bin", truncate(BIN, 0), NOT_WHOLE),
    "a list in a bin": (
        "bin", lambda folder: torch.save([torch.ones(1)], folder / BIN), r"must hold a dict of tensors; got list",
    ),
    "not JSON": ("one", lambda folder: (folder / "config.json").write_text("{"), r"config.json: the file must be JSON"),
    "no config": ("one", lambda folder: (folder / "config.json").unlink(), r"must hold a config.json; got none"),
    "no weights": ("one", lambda folder: (folder / ONE).unlink(), r"must hold one of model.safetensors.index.json"),
    "another model": ("one", edit_config(model_type="gpt_neox"), r"model_type must be 'gptj'; got 'gpt_neox'"),
    "another activation": ("one", edit_config(activation_function="relu"), r"activation_function must be 'gelu_new'"),
    "tied embeddings": ("one", edit_config(tie_word_embeddings=True), r"tie_word_embeddings must be False; got True"),
    "another size": ("one", edit_config(n_layer=4), r"tensor 'transformer.h.3.*no tensor of that name and \d+ more"),
    "an impossible size": ("one", edit_config(n_head=5), r"config.json: GPTJConfig: n_embd must be a multiple of"),
    "a size that is not there": (
        "one", edit_json("config.json", lambda x: x.pop("n_embd")), r"n_embd must be given; got no such key",
    ),
    "an empty index": (
        "shards", edit_json(MANY, lambda x: x.update(weight_map={})), r"weight_map must be an object of shards",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints(spoilt, case):
    layout, change, said = BAD[case]
    folder = spoilt(layout, change)
    with pytest.raises(ValueError, match=said) as caught:
        GPTJ.from_pretrained(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(folder))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", "a\\b", 3])
def test_index_that_leads_outside_the_folder(spoilt, name):
    outside = spoilt("shards", edit_json(MANY, lambda x: x["weight_map"].update({K_PROJ: name})))
    shutil.copy(next(outside.glob("model-00001*")), outside.parent / ONE)
    with pytest.raises(ValueError, match="a shard must be the name of a file in the same folder; got"):
        GPTJ.from_pretrained(outside)


class Bomb:
    def __reduce__(self):
        return (open, (Bomb.path, "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_executes_nothing(spoilt, tmp_path, zipped, tiny):
    Bomb.path = str(tmp_path / "executed")

    def plant(folder: Path) -> None:
        torch.save(
            tiny.state_dict() | {"x": Bomb()}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped
        )

    with pytest.raises(ValueError, match=r"pytorch_model.bin: the file must be a whole file of tensors alone"):
        GPTJ.from_pretrained(spoilt("bin", plant))
    assert not Path(Bomb.path).exists()


def test_bin_files_need_a_torch_whose_unpickler_is_safe(folders, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(
        ValueError, match=r"torch must be 2.10 or newer to read .bin files; got 2.9.1\+cpu; upgrade torch"
    ):
        GPTJ.from_pretrained(folders["bin"])
    GPTJ.from_pretrained(folders["one"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x.update(layout=2), "the layout must be version 1; got version 2; quantise the weight again"),
        (lambda x: x.update(format="other"), "limber_fast must be of format 'limber_fast.GPTJ'; got"),
        (lambda x: x.update(file="../x.safetensors"), "a shard must be the name of a file in the same folder"),
        (
            lambda x: x.update(file="x.safetensors"),
            "shard 'x.safetensors' must be in the same folder; got no such file",
        ),
        (lambda x: x.update(dtype="int3"), "dtype must be one of 'bfloat16'.*got 'int3'"),
        (lambda x: x.update(kv_cache=3), "config.json: kv_cache must be one of 'float', 'int8'; got 3"),
        (lambda x: x.update(weights="float"), "the file must hold this model's tensors alone|must be bfloat16"),
        (lambda x: x.update(weights="int3"), "weights must be one of 'float', 'int8'; got 'int3'"),
        (lambda x: x.update(outlier_threshold="a"), "outlier_threshold must be a number"),
    ],
)
def test_bad_saved_models(tiny_int8, tmp_path, change, said):
    GPTJ.from_config(tiny_int8.config).save_pretrained(tmp_path)
    edit_json("config.json", lambda x: change(x[gptj_files.KEY]))(tmp_path)
    with pytest.raises((ValueError, TypeError), match=said):
        GPTJ.from_pretrained(tmp_path)


def test_saved_model_with_foreign_tensors_or_without_its_end(tiny_int8, tmp_path):
    model = GPTJ.from_config(tiny_int8.config)
    model.save_pretrained(tmp_path)
    (data,) = tmp_path.glob("*.safetensors")
    whole = load_file(data)
    for change, said in (
        (lambda x: x.pop("ln_f.weight"), r"tensor 'ln_f.weight' must be bfloat16 \(84,\); got no tensor of that name"),
        (
            lambda x: x.update(wte=x["wte"][:5].clone()),
            r"tensor 'wte' must be bfloat16 \(301, 84\); got torch.bfloat16 sh",
        ),
        (
            lambda x: x.update({"ln_f.bias": x["ln_f.bias"].float()}),
            r"tensor 'ln_f.bias' must be bfloat16 \(84,\); got to",
        ),
        (lambda x: x.update(other=torch.ones(1)), r"the file must hold this model's tensors alone; got 'other'"),
    ):
        tensors = dict(whole)
        change(tensors)
        save_file(tensors, data)
        with pytest.raises(ValueError, match=said):
            GPTJ.from_pretrained(tmp_path)
    os.truncate(data, 9000)
    with pytest.raises(ValueError, match="the file must be a whole safetensors file"):
        GPTJ.from_pretrained(tmp_path)


def test_what_is_no_model_at_all(tmp_path):
    with pytest.raises(TypeError, match=r"model must be a GPTJForCausalLM; got Linear"):
        GPTJ.from_pretrained(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"the folder must hold a config.json; got none"):
        GPTJ.from_pretrained(tmp_path / "nowhere")
