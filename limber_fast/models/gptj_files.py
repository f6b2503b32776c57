"""GPT-J on disk: Hugging Face folders read shard by shard; folders of our own, written whole or not at all."""

from __future__ import annotations

import json
import os
import pickle
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limber_fast import checks
from limber_fast.models.gptj_layers import KINDS
from limber_fast.models.gptj_weights import BNB_SCALES, Filling, full_name, put
from limber_fast.ops.int8_weight import _huge_pages, in_file

FORMAT, LAYOUT, KEY = "limber_fast.GPTJ", 1, "limber_fast"
# Of what a folder may hold, the first that is there: an index of shards, or one file.
INDEXES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
SAFE_UNPICKLING = (2, 10)  # torch's weights_only has had holes up to 2.9
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
_ALIGNMENT = 4096


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise checks.invalid(str(path), "the file", "be JSON", str(error)) from error


def read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise checks.invalid(f"GPTJ.from_pretrained: {folder}", "the folder", "hold a config.json", "none")
    found = read_json(folder / "config.json")
    if not isinstance(found, dict):
        raise checks.invalid(str(folder / "config.json"), "the file", "be an object", type(found).__name__)
    return found


def _member(folder: Path, name: Any, source: Path) -> Path:
    """A file of this very folder: a name in a file must not lead elsewhere."""
    if not isinstance(name, str) or not name or name != os.path.basename(name) or name in (".", "..") or "\\" in name:
        raise checks.invalid(str(source), "a shard", "be the name of a file in the same folder", repr(name))
    if not (folder / name).is_file():
        raise checks.invalid(str(source), f"shard {name!r}", "be in the same folder", "no such file")
    return folder / name


def _shards(folder: Path) -> list[Path]:
    for name in INDEXES:
        path = folder / name
        if not path.is_file():
            continue
        if not name.endswith(".json"):
            return [path]
        found = read_json(path)
        names = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(names, dict) or not names:
            raise checks.invalid(str(path), "weight_map", "be an object of shards by tensor", type(names).__name__)
        return [_member(folder, shard, path) for shard in sorted({*names.values()}, key=str)]
    raise checks.invalid(f"GPTJ.from_pretrained: {folder}", "the folder", f"hold one of {', '.join(INDEXES)}", "none")


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _open_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise checks.invalid(str(path), "the file", "be a whole safetensors file", _one_line(error)) from error


def _read_bin(path: Path) -> Mapping[str, Tensor]:
    if tuple(int(x) for x in torch.__version__.split(".")[:2]) < SAFE_UNPICKLING:
        least = ".".join(map(str, SAFE_UNPICKLING))
        remedy = "upgrade torch, or convert the file to safetensors elsewhere"
        raise checks.invalid(str(path), "torch", f"be {least} or newer to read .bin files", torch.__version__, remedy)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        contract = "be a whole file of tensors alone, as torch.save writes it"
        raise checks.invalid(str(path), "the file", contract, _one_line(error)) from error
    if not isinstance(found, Mapping) or not all(isinstance(x, Tensor) for x in found.values()):
        raise checks.invalid(str(path), "the file", "hold a dict of tensors", type(found).__name__)
    return found


def _tensors(path: Path) -> Iterator[tuple[str, Callable[[str], Tensor]]]:
    """(full name, a function of any full name of this shard to its tensor), for each tensor of one shard."""
    if path.suffix == ".safetensors":
        file = _open_safetensors(path)
        names, get = {full_name(name): name for name in file.keys()}, file.get_tensor  # noqa: SIM118
    else:
        found = _read_bin(path)
        names, get = {full_name(name): name for name in found}, found.__getitem__
    for name in names:
        yield name, lambda name: get(names[name]) if name in names else None


def fill_from_folder(filling: Filling, folder: Path) -> None:
    """Reads a Hugging Face folder; holds one shard at a time beside the model."""
    shards = _shards(folder)
    if shards[0].suffix == ".safetensors":  # names and shapes are in the headers: nothing is read before all fit
        names: list[str] = []
        for path in shards:
            file = _open_safetensors(path)
            for name in file.keys():  # noqa: SIM118
                filling.check_shape(full_name(name), file.get_slice(name).get_shape())
                names.append(full_name(name))
        filling.check_names(names)
    extra = []
    for path in shards:
        filling.source = str(path)
        for name, get in _tensors(path):
            if name in filling.expected:
                tensor = get(name)
                scales = get(name.removesuffix(".weight") + BNB_SCALES) if tensor.dtype == torch.int8 else None
                filling.add(name, tensor, scales)
            else:
                extra.append(name)
    filling.source = str(folder)
    filling.check_names([*filling.expected.keys() - filling.missing, *extra])


def save(model: nn.Module, folder: Path) -> None:
    """Writes a folder that `load` reads. config.json names the one file of tensors and replaces an older one last, in a
    single rename: whatever fails before, a full disk too, leaves the folder as it was."""
    op, old = f"GPTJ.save_pretrained: {folder}", None
    if (folder / "config.json").exists():
        old = read_config(folder).get(KEY, {}).get("file")
        if old is None:
            raise checks.invalid(op, "the folder", "be new or hold a saved GPTJ", "another model's config.json")
    folder.mkdir(parents=True, exist_ok=True)
    how = model.precision
    data = folder / f"limber_fast-{uuid.uuid4().hex}.safetensors"
    config = folder / f".config.json.{uuid.uuid4().hex}"
    facts = {"format": FORMAT, "layout": LAYOUT, "file": data.name, "weights": how.weights, "compute": how.compute,
             "outlier_threshold": how.outlier_threshold, "kv_cache": how.kv_cache, "embedding": how.embedding,
             "dtype": str(model.dtype).removeprefix("torch.")}  # fmt: skip
    try:
        _write_tensors(data, _tensors_of(model))
        with open(config, "w", encoding="utf-8") as file:
            json.dump({**model.config.to_dict(), KEY: facts}, file, indent=2)
            _flush(file)
        os.replace(config, folder / "config.json")
    except BaseException:
        for path in (data, config):
            path.unlink(missing_ok=True)
        raise
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if isinstance(old, str) and old == os.path.basename(old) != data.name:
        (folder / old).unlink(missing_ok=True)


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All that a model consists of; adapters, which may be trained in fp32, in the model's dtype."""
    adapters = {name: p.detach().to(model.dtype) for name, p in model.named_parameters()}
    return dict(model.named_buffers()) | adapters


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file, streamed: safetensors' own writer would hold a second copy of everything. Large tensors come
    first and start on pages."""
    shapes = {name: _stored(name, x.to("meta")) for name, x in tensors.items()}
    names = sorted(shapes, key=lambda name: (-shapes[name].nbytes // _ALIGNMENT, name))
    kinds = {torch.int8: "I8", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32",
             torch.float64: "F64"}  # fmt: skip
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT}}
    at = 0
    for name in names:
        x = shapes[name]
        header[name] = {"dtype": kinds[x.dtype], "shape": list(x.shape), "data_offsets": [at, at + x.nbytes]}
        at += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            x = _stored(name, tensors[name]).detach().cpu().contiguous()
            file.write(x.reshape(-1).view(torch.uint8).numpy().data)
        _flush(file)


def _stored(name: str, x: Tensor) -> Tensor:
    return in_file(x) if name.endswith("packed") else x


def saved_facts(folder: Path, found: dict[str, Any]) -> dict[str, Any] | None:
    """What `save` noted in config.json, checked; None for another program's folder."""
    facts, source = found.get(KEY), str(folder / "config.json")
    if facts is None:
        return None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise checks.invalid(source, KEY, f"be of format {FORMAT!r}", repr(facts)[:80])
    checks.stored_layout(source, facts.get("layout"), LAYOUT)
    checks.choice(source, "dtype", facts.get("dtype"), tuple(_DTYPES))
    data = _member(folder, facts.get("file"), folder / "config.json")
    kept = {name: facts.get(name) for name in ("weights", "compute", "outlier_threshold")}
    for name in ("kv_cache", "embedding"):
        kept[name] = facts.get(name, "float")  # older files do not name it
        checks.choice(source, name, kept[name], KINDS)
    return {**kept, "dtype": _DTYPES[facts["dtype"]], "data": data}


def load(model: nn.Module, data: Path, mmap: bool, device: torch.device | str | None) -> None:
    """Fills a GPTJ on meta with what `save` wrote; `mmap` leaves the tensors in the file's pages."""
    file = _open_safetensors(data)
    stored, expected = set(file.keys()), _tensors_of(model)
    if extra := sorted(stored - set(expected)):
        raise checks.invalid(str(data), "the file", "hold this model's tensors alone", repr(extra[0]))
    for name, empty in expected.items():
        found = file.get_tensor(name) if name in stored else None
        checks.stored_tensor(str(data), name, found, empty.dtype, tuple(empty.shape))
        if not mmap:
            found = _huge_pages(torch.empty_like(found)).copy_(found)
        path, _, last = name.rpartition(".")
        owner = model.get_submodule(path)
        put(owner, last, found if device is None else found.to(device))
        if last == "packed":
            owner.arrange()
