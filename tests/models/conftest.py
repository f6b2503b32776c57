"""GPT-Js of transformers and their counterparts here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from gptj_cases import SIZES, transformers_gptj

from limber_fast import GPTJ


@pytest.fixture(scope="session", params=list(SIZES))
def theirs(request):
    return transformers_gptj(request.param)


@pytest.fixture(scope="session")
def tiny():
    return transformers_gptj("tiny")


@pytest.fixture(scope="session")
def ours(theirs):
    return GPTJ.from_transformers(theirs, weights="float", dtype=torch.float32)


@pytest.fixture(scope="session")
def tiny_ours(tiny):
    return GPTJ.from_transformers(tiny, weights="float", dtype=torch.float32)


@pytest.fixture(scope="session")
def tiny_int8(tiny):
    return GPTJ.from_transformers(tiny, dtype=torch.float32)


@pytest.fixture(scope="session")
def folders(tiny, tmp_path_factory) -> dict[str, Path]:
    """One checkpoint in every layout that Hugging Face folders have had."""
    root = tmp_path_factory.mktemp("checkpoints")
    tiny.save_pretrained(root / "one")
    tiny.save_pretrained(root / "shards", max_shard_size="150KB")
    assert len(list((root / "shards").glob("*.safetensors"))) > 3
    tensors = tiny.state_dict()
    for name in ("bin", "bin shards", "old bin", "old shards"):
        (root / name).mkdir()
        shutil.copy(root / "one" / "config.json", root / name)
    torch.save(tensors, root / "bin" / "pytorch_model.bin")
    torch.save(tensors, root / "old bin" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    buffers = {
        f"transformer.h.{i}.attn.{name}": torch.ones(1, 1, 4, 4).bool()
        for i in range(3)
        for name in ("bias", "masked_bias")
    }
    names = [*tensors, *buffers]
    for folder, old in (("bin shards", False), ("old shards", True)):
        index = {name: f"pytorch_model-{i % 3}.bin" for i, name in enumerate(names)}  # q, k and v in three files
        for shard in set(index.values()):
            part = {name: (tensors | buffers)[name].clone() for name in names if index[name] == shard}
            torch.save(part, root / folder / shard, _use_new_zipfile_serialization=not old)
        (root / folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return {path.name: path for path in root.iterdir()}
