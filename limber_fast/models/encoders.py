"""Frozen image encoders of LiMBeR: pictures to [n, k, D] features, one soft prompt each, with the right preprocessing.

An encoder comes from the library that maintains it (open_clip, timm, transformers); here is only where its features are
taken from. `encoder(name)` makes one by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limber_fast import checks
from limber_fast.files import fill, load_state
from limber_fast.models import open_clip_files
from limber_fast.optional import needed

_OP = "encoder"
# What LiMBeR's rows are called: the encoder, and whether it is pre-trained.
NAMED = {
    "clip": ("open_clip:RN50x16", "openai"),
    "clip-random": ("open_clip:RN50x16", None),
    "beit": ("beit", "microsoft/beit-large-patch16-224-pt22k"),
    "beit-ft": ("beit", "microsoft/beit-large-patch16-224-pt22k-ft22k"),
    "beit-random": ("beit", None),
    "nfrn50": ("nfrn50", True),
    "nfrn50-random": ("nfrn50", None),
}
# BEIT-Large; what its config.json says where it differs from BeitConfig's defaults (arXiv 2106.08254, table 1).
_BEIT_LARGE = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
    "use_relative_position_bias": True, "layer_scale_init_value": 1e-5, "use_mean_pooling": True,
}  # fmt: skip


class ImageEncoder(nn.Module):
    """A picture encoder cut where LiMBeR takes its features.

    Attributes:
        name, weights, seed: what `encoder` made it by. tokens: k. width: D. size: (H, W) that `preprocess` gives.
        preprocess: PIL image -> [3, H, W] fp32.
        own: its weights came from elsewhere, so that whoever saves it has to save them.
    """

    def __init__(
        self, name: str, trunk: nn.Module, take: Callable[[nn.Module, Tensor], Tensor],
        preprocess: Callable[[Any], Tensor], size: int | tuple[int, int],
    ) -> None:  # fmt: skip
        super().__init__()
        self.name, self.trunk, self._take, self.preprocess = name, trunk, take, preprocess
        self.weights, self.seed, self.own = None, 0, False
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.requires_grad_(False).eval()
        with torch.no_grad():
            self.tokens, self.width = self(torch.zeros(1, 3, *self.size)).shape[1:]

    def forward(self, images: Tensor) -> Tensor:
        """Preprocessed images [n, 3, H, W] -> features [n, k, D]."""
        x = self._take(self.trunk, images)
        return x[:, None] if x.ndim == 2 else x

    def pixels(self, images: Sequence[Any] | Tensor) -> Tensor:
        """PIL images, or a tensor that is preprocessed already, as [n, 3, H, W] on the encoder's device."""
        if not isinstance(images, Tensor):
            images = torch.stack([self.preprocess(image) for image in images])
        if images.ndim != 4 or images.shape[1:] != (3, *self.size):
            contract = f"be pictures, or preprocessed to [n, 3, {self.size[0]}, {self.size[1]}]"
            raise checks.invalid(self.name, "images", contract, checks.shape_of(images))
        first = next(self.parameters(), None)
        return images if first is None else images.to(first.device, first.dtype)

    def extra_repr(self) -> str:
        return f"{self.name}: {self.tokens} x {self.width} from {self.size[0]} x {self.size[1]} pixels"


def encoder(name: str, *, weights: str | os.PathLike[str] | bool | None = True, seed: int = 0) -> ImageEncoder:
    """An encoder by name.

    Args:
        name: 'clip' (RN50x16, the 12 x 12 grid before attention pooling: 144 x 3072), 'beit' and 'beit-ft' (BEIT-Large,
            its 196 patches x 1024), 'nfrn50' (NF-ResNet50, pooled: 1 x 2048), each with '-random' for the same without
            pre-training; 'open_clip:MODEL' and 'timm:MODEL' for any model of those libraries (the grid of a
            convolutional one, the patches of a transformer); 'demo:CHECKPOINT' for the CLIP of `limber-fast demo`,
            whose 2 x 2 grid is taken.
        weights: True for the pre-trained ones, which the libraries download (of an open_clip model, if it has one set);
            a tag of theirs for open_clip:MODEL, timm's are part of the name: timm:MODEL.TAG; a file of a state dict
            (safetensors, a TorchScript archive such as OpenAI's RN50x16.pt, or read with weights_only; nothing in it is
            run), which wins over a tag of the same name; False or None for random ones. `ImageEncoder.weights` has its
            absolute path, and `name` that of CHECKPOINT: what is saved loads from any working directory.
        seed: of random weights.

    Raises: ValueError for an unknown name. ImportError with the command that installs what is missing.
    """
    base, tag = NAMED.get(name, (name, True))
    chosen = tag if weights is True else weights
    kind, _, model = base.partition(":")
    makers = {"open_clip": _open_clip, "timm": _timm, "beit": _beit, "nfrn50": _nfrn50, "demo": _demo}
    if kind not in makers or (kind in ("open_clip", "timm", "demo")) != bool(model):
        known = ", ".join([*NAMED, "open_clip:MODEL", "timm:MODEL", "demo:CHECKPOINT"])
        raise checks.invalid(_OP, "name", f"be one of {known}", repr(name))
    if kind == "demo":
        model = os.path.abspath(model)
        name = f"{kind}:{model}"
    elif isinstance(weights, (str, os.PathLike)) and (os.path.exists if kind == "beit" else os.path.isfile)(weights):
        weights = chosen = os.path.abspath(weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = makers[kind](name, model, chosen or None)
    found.weights, found.seed = weights if isinstance(weights, bool) or weights is None else str(weights), seed
    return found


def weights_of(flag: str) -> bool | str | None:
    """`weights` of `encoder` as commands write them: '' for the pre-trained ones, 'random', a set's name or a file."""
    return {"": True, "random": None}.get(flag, flag)


def _load(trunk: nn.Module, weights: Any) -> nn.Module:
    """Random weights for None, else those of a file."""
    if weights is not None:
        fill(trunk, load_state(weights), str(weights))
    return trunk


def open_clip_model(name: str, model: str, weights: Any) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    """(CLIP, its preprocessing) by the name that open_clip has for it; weights as of `encoder`."""
    open_clip = needed("open_clip", f"encoder {name!r}")
    if open_clip.get_model_config(model) is None:
        raise checks.invalid(_OP, "name", "be a model of open_clip.list_models()", repr(model))
    tags = open_clip.list_pretrained_tags_by_model(model)
    if weights is True:
        if len(tags) != 1:
            raise checks.invalid(_OP, "weights", f"be one of {', '.join(tags) or 'a file, or None'}", "True")
        weights = tags[0]
    path = None if weights is None or not Path(weights).is_file() else str(weights)
    if weights is not None and path is None and weights not in tags:
        raise checks.invalid(_OP, "weights", f"be a file or one of {', '.join(tags)}", repr(weights))
    if path is None:  # open_clip only warns of a set that was trained with another activation than the model's
        known = {} if weights is None else open_clip.get_pretrained_cfg(model, weights)
        state, quick_gelu = None, known.get("quick_gelu", False)
    else:
        state, quick_gelu = open_clip_files.read(path)
    try:
        with open_clip_files.quiet():
            found = open_clip.create_model(
                model, pretrained=weights if path is None else None, pretrained_text=False,
                force_quick_gelu=quick_gelu,
            ).eval()  # fmt: skip
    except RuntimeError as error:  # what it makes of every way in which the hub cannot be reached
        if "download" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise OSError(f"{_OP} {name}: its weights are not here and did not arrive: {reason}") from error
    if path is not None:
        open_clip_files.load(open_clip, found, state, path, name, quick_gelu)
    config = open_clip.transform.PreprocessCfg(**found.visual.preprocess_cfg)
    return found, open_clip.transform.image_transform_v2(config, is_train=False)


def _open_clip(name: str, model: str, weights: Any) -> ImageEncoder:
    found, preprocess = open_clip_model(name, model, weights)
    visual, size = found.visual, found.visual.image_size
    if hasattr(visual, "attnpool"):  # open_clip's ModifiedResNet
        visual.attnpool = nn.Identity()
        take = _grid
    elif hasattr(visual, "trunk"):  # a timm model
        visual, take = visual.trunk, _timm_features
    elif visual.attn_pool is not None:  # CoCa's, whose tokens are the pooling's queries
        take = _patches
    else:
        visual.output_tokens, take = True, lambda trunk, images: trunk(images)[1]
    return ImageEncoder(name, visual, take, preprocess, size)


def _grid(trunk: nn.Module, images: Tensor) -> Tensor:
    return trunk(images).flatten(2).mT


def _patches(trunk: nn.Module, images: Tensor) -> Tensor:
    """Of the last block, as the pooling takes them."""
    found = trunk.forward_intermediates(images, indices=1, output_fmt="NLC", intermediates_only=True)
    return found["image_intermediates"][0]


def timm_model(name: str, model: str, weights: Any) -> tuple[nn.Module, Callable[[Any], Tensor], tuple[int, int]]:
    """(model without its classifier, its preprocessing, (H, W)) by the name that timm has for it."""
    timm = needed("timm", f"encoder {name!r}")
    if not timm.is_model(model.partition(".")[0]):
        raise checks.invalid(_OP, "name", "be a model of timm.list_models()", repr(model))
    trunk = _of_timm(timm, model, weights)
    data = timm.data.resolve_model_data_config(trunk)
    transform = timm.data.create_transform(**data, is_training=False)
    return trunk, lambda image: transform(_rgb(image)), tuple(data["input_size"][1:])


def _timm(name: str, model: str, weights: Any) -> ImageEncoder:
    trunk, preprocess, size = timm_model(name, model, weights)
    return ImageEncoder(name, trunk, _timm_features, preprocess, size)


def _of_timm(timm: Any, model: str, weights: Any) -> nn.Module:
    if weights is True:
        return timm.create_model(model, pretrained=True, num_classes=0)
    return _load(timm.create_model(model, num_classes=0), weights)


def _timm_features(trunk: nn.Module, images: Tensor) -> Tensor:
    x = trunk.forward_features(images)
    if not isinstance(x, Tensor):
        raise checks.invalid(_OP, "name", "be a model with one map of features", f"{type(trunk).__name__}, which has "
                             f"{len(x)}", "see timm.list_models()")  # fmt: skip
    if x.ndim == 3:
        prefix = _prefix_tokens(trunk)
        if x.shape[1] <= prefix:
            contract = "be a model whose features have places in the picture"
            raise checks.invalid(_OP, "name", contract, f"{type(trunk).__name__}, which has its class token alone")
        return x[:, prefix:]
    return (x if x.shape[1] == trunk.num_features else x.movedim(3, 1)).flatten(2).mT


def _prefix_tokens(trunk: nn.Module) -> int:
    """How many tokens come before those of the picture's places; not all of timm's models say it."""
    if (said := getattr(trunk, "num_prefix_tokens", None)) is not None:
        return said
    return next((x.shape[1] for name, x in trunk.named_parameters(recurse=False) if name.startswith("cls_token")), 0)


def _beit(name: str, _: str, weights: Any) -> ImageEncoder:
    transformers, transforms = needed("transformers", f"encoder {name!r}"), needed("torchvision.transforms", name)
    if weights is None or Path(weights).is_file():
        trunk = transformers.BeitModel(transformers.BeitConfig(**_BEIT_LARGE), add_pooling_layer=False)
        _load(trunk, weights)
    else:  # a name of the hub, or a folder
        trunk = transformers.BeitModel.from_pretrained(weights, add_pooling_layer=False)
    size, half = trunk.config.image_size, (0.5, 0.5, 0.5)
    bilinear = transforms.InterpolationMode.BILINEAR
    preprocess = transforms.Compose([  # both sides to the size: not in proportion
        _rgb, transforms.Resize((size, size), bilinear), transforms.ToTensor(), transforms.Normalize(half, half),
    ])  # fmt: skip
    return ImageEncoder(name, trunk, lambda trunk, images: trunk(images).last_hidden_state[:, 1:], preprocess, size)


def _nfrn50(name: str, _: str, weights: Any) -> ImageEncoder:
    timm, transforms = needed("timm", f"encoder {name!r}"), needed("torchvision.transforms", name)
    trunk = _of_timm(timm, "nf_resnet50", weights)
    preprocess = transforms.Compose([_rgb, transforms.CenterCrop(384), transforms.ToTensor()])  # smaller ones: zeros
    return ImageEncoder(name, trunk, lambda trunk, images: trunk.forward_features(images).mean((2, 3)), preprocess, 384)


def _demo(name: str, checkpoint: str, weights: Any) -> ImageEncoder:
    from limber_fast.demo import load_model
    from limber_fast.models.clip import SmallResNet

    if weights not in (None, True):
        raise checks.invalid(_OP, "weights", "be True or None with demo:CHECKPOINT", repr(weights))
    model, _ = load_model(Path(checkpoint))
    visual = model.visual
    if weights is None:
        visual = SmallResNet(model.config.embed_dim, model.config.image_size, model.config.image_width)
    return ImageEncoder(name, visual, lambda trunk, images: trunk.grid(images), small_pixels, visual.image_size)


def _rgb(image: Any) -> Any:
    from limber_fast.data.pictures import to_rgb  # Pillow, which only those need who have pictures

    return to_rgb(image)


def small_pixels(image: Any) -> Tensor:
    """A picture as the demo's CLIP takes it: 32 x 32, channels in [0, 1]."""
    import numpy as np

    pixels = torch.from_numpy(np.array(_rgb(image))).permute(2, 0, 1).float() / 255
    if pixels.shape[1:] != (32, 32):
        pixels = F.interpolate(pixels[None], (32, 32), mode="area")[0]
    return pixels
