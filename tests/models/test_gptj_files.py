"""Checkpoints in and out: every layout gives the same model, memory stays bounded, a failed save leaves the old."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from gptj_cases import ids_of
from safetensors.torch import load_file, save_file

from limber_fast import GPTJ, GPTJConfig
from limber_fast.models.gptj_weights import shapes


def same(a: GPTJ, b: GPTJ) -> bool:
    x, y = dict(a.named_buffers()), dict(b.named_buffers())
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


@pytest.mark.parametrize("layout", ["one", "shards", "bin", "old bin", "bin shards", "old shards"])
def test_every_layout_of_a_checkpoint_gives_the_same_model(folders, tiny, layout):
    found = GPTJ.from_pretrained(folders[layout], dtype=torch.float32)
    assert same(found, GPTJ.from_transformers(tiny, dtype=torch.float32))
    floating = GPTJ.from_pretrained(str(folders[layout]), weights="float", dtype=torch.float32)
    assert same(floating, GPTJ.from_pretrained(tiny, weights="float", dtype=torch.float32))


def test_bare_model_names_and_bitsandbytes_layers(tiny, folders, tmp_path):
    """Integers and the absmax of each row, as bitsandbytes stores them, come back as the same integers."""
    tensors, theirs = load_file(folders["one"] / "model.safetensors"), {}
    for name, x in tensors.items():
        bare = name.removeprefix("transformer.")
        if x.ndim == 2 and ("_proj" in name or "mlp.fc" in name):
            absmax = x.abs().amax(1)
            theirs[bare] = (x * (127 / absmax)[:, None]).round().to(torch.int8)
            theirs[bare.removesuffix("weight") + "SCB"] = absmax
            theirs[bare + "_format"] = torch.tensor(0, dtype=torch.uint8)
        else:
            theirs[bare] = x
    shutil.copy(folders["one"] / "config.json", tmp_path)
    save_file(theirs, tmp_path / "model.safetensors")
    found, expected = (
        GPTJ.from_pretrained(tmp_path, dtype=torch.float32),
        GPTJ.from_pretrained(tiny, dtype=torch.float32),
    )
    for i in range(3):
        for layer in ("qkv", "out_proj", "fc_in", "fc_out"):
            a, b = (getattr(model.h[i], layer).weight for model in (found, expected))
            assert (a.integers().int() - b.integers().int()).abs().max() <= 1  # ties, and scales of another rounding
            assert torch.allclose(a.scales, b.scales, rtol=1e-6)


@pytest.mark.parametrize("weights", ["int8", "float"])
@pytest.mark.parametrize("mmap", [True, False])
def test_saved_and_loaded_again(tiny, tmp_path, weights, mmap):
    model = GPTJ.from_pretrained(tiny, weights=weights, compute="w8a8", outlier_threshold=5.0)
    model.save_pretrained(tmp_path / "new" / "model")
    found = GPTJ.from_pretrained(tmp_path / "new" / "model", mmap=mmap)
    assert same(found, model) and found.config == model.config and found.precision == model.precision
    ids = ids_of(model, 2, 9)
    assert torch.equal(found(ids).logits, model(ids).logits)
    assert GPTJ.from_pretrained(tmp_path / "new" / "model", compute="w8a16").compute == "w8a16"
    other = {"int8": "float", "float": "int8"}[weights]
    with pytest.raises(ValueError, match=f"weights must be {weights}, as saved; got {other}; load the original"):
        GPTJ.from_pretrained(tmp_path / "new" / "model", weights=other)


def test_saving_again_replaces_the_old_and_leaves_other_files(tiny_int8, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    config = tiny_int8.config
    GPTJ.from_config(config, 1).save_pretrained(tmp_path)
    second = GPTJ.from_config(config, 2)
    second.save_pretrained(tmp_path)
    assert same(GPTJ.from_pretrained(tmp_path), second)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json", ".safetensors"]


def test_a_mapped_model_survives_being_saved_over(tiny_int8, tmp_path):
    GPTJ.from_config(tiny_int8.config, 1).save_pretrained(tmp_path)
    mapped = GPTJ.from_pretrained(tmp_path)
    mapped.compute = "w8a8"
    mapped.save_pretrained(tmp_path)
    assert same(mapped, GPTJ.from_config(tiny_int8.config, 1)) and GPTJ.from_pretrained(tmp_path).compute == "w8a8"


def test_a_folder_with_another_model_is_not_overwritten(folders, tiny_int8):
    before = sorted(path.name for path in folders["one"].iterdir())
    with pytest.raises(ValueError, match="must be new or hold a saved GPTJ; got another model's config"):
        tiny_int8.save_pretrained(folders["one"])
    assert before == sorted(path.name for path in folders["one"].iterdir())


def test_a_full_disk_leaves_the_old_model(tmp_path):
    """The kernel refuses to let any file grow beyond a limit, as a full disk would."""
    config = GPTJConfig(vocab_size=64, n_embd=64, n_layer=1, n_head=1, rotary_dim=16)
    old = GPTJ.from_config(config, 1)
    old.save_pretrained(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (100, 30_000):  # within the header, and within the weights
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with pytest.raises(OSError):
                GPTJ.from_config(config, 2).save_pretrained(tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        assert same(GPTJ.from_pretrained(tmp_path), old)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_quantising_a_checkpoint_holds_the_model_and_one_shard(tmp_path):
    """A process of its own, and shards without zip, which cannot be mapped: each is read whole, and then let go."""
    width, shards = 512, 8
    config = GPTJConfig(vocab_size=64, n_embd=width, n_layer=shards, n_head=4, rotary_dim=64)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    floating, index = GPTJ.from_config(config, weights="float", dtype=torch.float32), {}
    largest = 0
    for shard in range(shards):
        part = {name: torch.full(shape, 0.01) for name, shape in shapes(config).items()
                if f".h.{shard}." in name or (shard == 0 and ".h." not in name)}  # fmt: skip
        index |= dict.fromkeys(part, f"pytorch_model-{shard}.bin")
        torch.save(part, tmp_path / f"pytorch_model-{shard}.bin", _use_new_zipfile_serialization=False)
        largest = max(largest, sum(x.nbytes for x in part.values()))
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    code = f"""
import torch
from pathlib import Path
from limber_fast import GPTJ, native, quantize_int8
torch.set_num_threads(1)
native.cpu()
quantize_int8(torch.ones(64, 64))
torch.load({str(tmp_path / "pytorch_model-1.bin")!r}, weights_only=True)
def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
model = GPTJ.from_pretrained({str(tmp_path)!r})
print(status("VmHWM") - before, sum(x.nbytes for x in model.buffers()))
"""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed at once, as tensors of real size are
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    peak, model = map(int, done.stdout.split())
    whole = sum(x.nbytes for x in floating.buffers())
    assert whole > 4 * (model + largest) / 2
    # beside them: the float working copies of quantize_int8 (one fc_in at this size) and what the allocator keeps
    assert model < peak < model + 3 * largest < whole
