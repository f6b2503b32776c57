"""The small CLIP of the demo: open_clip's model, a small ResNet of our own as image tower, texts of a few words."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.transformer import text_global_pool
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

MAX_LOGIT_SCALE = math.log(100)


@dataclass(frozen=True)
class SmallClipConfig:
    """Sizes of the two towers; `vocab_size` comes from the tokenizer. `text_layers` 0 is a bag of words."""

    vocab_size: int
    embed_dim: int = 128
    image_size: int = 32
    image_width: int = 48
    context_length: int = 12
    text_width: int = 128
    text_heads: int = 2
    text_layers: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < (least := 0 if name == "text_layers" else 1):
                raise ValueError(f"SmallClipConfig: {name} must be at least {least}; got {value}")
        if self.image_size % 16:
            raise ValueError(f"SmallClipConfig: image_size must be a multiple of 16; got {self.image_size}")
        if self.text_width % self.text_heads:
            raise ValueError(f"SmallClipConfig: text_width {self.text_width} must be a multiple of text_heads")


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut, projected where the shape changes (arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(y)).add_(self.shortcut(x)), inplace=True)


class SmallResNet(nn.Module):
    """Image tower: stem /2, one residual block per width w, 2w, 4w, then the 2x2 map flattened into one linear map.

    The last map keeps its 2x2 layout: with 32-pixel drawings *where* a part sits is half of what it is, and average
    pooling throws that away (far worse on the validation vendor).

    Args: images: [B, 3, H, W] fp32 in [0, 1]. Returns: [B, embed_dim], not normalised.
    """

    def __init__(self, embed_dim: int, image_size: int, width: int):
        super().__init__()
        self.image_size = (image_size, image_size)
        self.stem = nn.Conv2d(3, width, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            ResidualBlock(width, width, 1), ResidualBlock(width, 2 * width, 2), ResidualBlock(2 * width, 4 * width, 2)
        )
        self.pool = nn.AvgPool2d(image_size // 16)
        self.head = nn.Linear(4 * 4 * width, embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self._map(images).flatten(1))

    def grid(self, images: Tensor) -> Tensor:
        """The 2x2 map before the head, place by place: [B, 4, 4 * width]."""
        return self._map(images).flatten(2).mT

    def _map(self, images: Tensor) -> Tensor:
        x = (4 * images - 2).contiguous(memory_format=torch.channels_last)
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        return self.pool(self.blocks(x))


class SmallClip(CLIP):
    """open_clip's CLIP with `visual` replaced by `SmallResNet` and padding cut off before the text tower."""

    def __init__(self, config: SmallClipConfig):
        # open_clip builds a vision tower in any case: the smallest one it has, dropped in the next line.
        placeholder = CLIPVisionCfg(layers=1, width=8, head_width=8, patch_size=32, image_size=32)
        text = CLIPTextCfg(
            context_length=config.context_length,
            vocab_size=config.vocab_size,
            width=config.text_width,
            heads=config.text_heads,
            layers=max(1, config.text_layers),  # it cannot build none
        )
        super().__init__(config.embed_dim, placeholder, text)
        if config.text_layers == 0:
            self.transformer = nn.Identity()
            self.register_parameter("positional_embedding", None)
        self.visual = SmallResNet(config.embed_dim, config.image_size, config.image_width)
        self.visual.to(memory_format=torch.channels_last)
        self.config = config

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Text features of [B, context] token ids, without work on columns that are padding in every row.

        With layers: open_clip's features, as the causal mask keeps padding from EOS. Attention over a dozen tokens is
        three times faster as plain products than in PyTorch's CPU flash kernel, which pads to its tiles.
        Without: the tokens' embeddings added up, then open_clip's last norm and projection. Some thousand names teach a
        transformer their order before their meaning (SETTINGS.md).
        """
        text = text[:, : max(1, int((text != 0).sum(1).max()))]
        x = self._words(text) if self.config.text_layers == 0 else self._sentence(text)
        x = x @ self.text_projection
        return F.normalize(x, dim=-1) if normalize else x

    def _sentence(self, text: Tensor) -> Tensor:
        length = text.shape[1]
        x = self.token_embedding(text) + self.positional_embedding[:length]
        with sdpa_kernel(SDPBackend.MATH):
            x = self.transformer(x, attn_mask=self.attn_mask[:length, :length])
        return text_global_pool(self.ln_final(x), text, self.text_pool_type, eos_token_id=self.text_eos_id)

    def _words(self, text: Tensor) -> Tensor:
        token = text != 0
        x = self.token_embedding(text) * token[..., None]
        return self.ln_final(x.sum(1) / token.sum(1, keepdim=True).sqrt())

    @torch.no_grad()
    def clamp_logit_scale_(self) -> None:
        """Keep exp(logit_scale) <= 100, as in CLIP (arXiv 2103.00020, section 2.5)."""
        self.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
