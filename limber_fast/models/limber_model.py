"""LiMBeR's parts as one module: pictures and texts to the language model's input, and the loss that trains the map."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limber_fast import checks
from limber_fast.models.encoders import ImageEncoder
from limber_fast.models.gptj import GPTJ
from limber_fast.models.gptj_model import IGNORE_INDEX
from limber_fast.ops.project_concat import project_concat

_OP = "Limber"
IMAGE = object()  # a picture's place in a prompt
Part = Any  # a text, token ids, or IMAGE
Images = Sequence[Any] | Tensor


class LimberModel(nn.Module):
    """What trains; `limber_fast.Limber` adds what it says, and files."""

    def __init__(
        self, encoder: ImageEncoder | None, language_model: GPTJ, tokenizer: Any = None, *, width: int | None = None,
        dropout: float = 0.1, layer_norm: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if encoder is None and width is None:
            raise checks.invalid(_OP, "width", "be given where encoder is None", "None")
        checks.dropout(_OP, dropout, None)
        self.encoder, self.language_model, self.tokenizer = encoder, language_model, tokenizer
        embed = language_model.config.n_embd
        self.projection = nn.Linear(width or encoder.width, embed)
        self.layer_norm = nn.LayerNorm(embed) if layer_norm else None
        self.dropout = dropout

    @property
    def image_token_id(self) -> int:
        """Marks a soft prompt's place in token ids: the first id that no word has."""
        return self.language_model.config.vocab_size

    def train(self, mode: bool = True) -> LimberModel:
        """Frozen parts stay in evaluation mode."""
        super().train(mode)
        for part in (self.encoder, self.language_model):
            if part is not None and not any(p.requires_grad for p in part.parameters()):
                part.eval()
        return self

    def encode(self, images: Images) -> Tensor:
        """Features [n, k, D] of pictures (PIL images, or preprocessed [n, 3, H, W]); a tensor of rank 3 is features
        already and passes through."""
        if isinstance(images, Tensor) and images.ndim == 3:
            if images.shape[2] != self.projection.in_features:
                contract = f"be pictures, or features [n, k, {self.projection.in_features}]"
                raise checks.invalid(_OP, "images", contract, checks.shape_of(images))
            return images
        if self.encoder is None:
            contract = "be features [n, k, D] where there is no encoder"
            raise checks.invalid(_OP, "images", contract, checks.kind_of(images))
        tuned = self.training and any(p.requires_grad for p in self.encoder.parameters())
        with torch.set_grad_enabled(tuned and torch.is_grad_enabled()):
            if not isinstance(images, Tensor):
                checks.pictures(_OP, images := list(images) if hasattr(images, "__iter__") else images)
            return self.encoder(self.encoder.pixels(images))

    def inputs_embeds(self, features: Tensor, prompts: Sequence[Sequence[Part]]) -> tuple[Tensor, list[int]]:
        """All prompts' embedded tokens, one after another: [T, E] in the language model's dtype, and each one's length.

        Args:
            features: [n, k, D] of the pictures, in the order in which the prompts name them.
            prompts: each a list of texts, token ids and `IMAGE`.
        """
        ids = [self.token_ids(prompt, features.shape[1]) for prompt in prompts]
        return self._embed(features, torch.cat(ids)), [len(x) for x in ids]

    def token_ids(self, prompt: Sequence[Part], k: int) -> Tensor:
        """A prompt as ids, `image_token_id` k times for each picture."""
        ids: list[int] = []
        for part in prompt:
            if part is IMAGE:
                ids += [self.image_token_id] * k
            elif isinstance(part, str):
                ids += self._tokens(part)
            else:
                ids += [int(token) for token in part]
        if not ids:
            raise checks.invalid(_OP, "a prompt", "hold a picture or a token", "nothing")
        return torch.tensor(ids, device=self.language_model.device)

    def forward(
        self, images: Images, captions: Sequence[str | Sequence[int]], *, prompt: str = "", seed: int | None = None
    ) -> Tensor:
        """Mean cross entropy of captions behind their pictures, as LiMBeR trains:
        ``[picture][prompt][caption][end of text]``, loss on the caption and the end alone.

        Args:
            images: n pictures or their features. captions: n texts, or token ids.
            prompt: before each caption, with nothing between them.
            seed: of the dropout; by default from torch's generator.

        A caption that does not fit into the language model's context is cut off.

        Returns: 0-d fp32; gradients reach the projection, the LayerNorm and an encoder that is not frozen.
        """
        return self.loss(images, captions, prompt=prompt, seed=seed)[0]

    def loss(
        self, images: Images, captions: Sequence[str | Sequence[int]], *, prompt: str = "", seed: int | None = None
    ) -> tuple[Tensor, int]:
        """What `forward` gives, and the number of tokens that it is the mean of."""
        captions = checks.listed_texts(_OP, "captions", captions)
        features = self.encode(images)
        checks.text(_OP, "prompt", prompt)
        if not captions:
            raise checks.invalid(_OP, "captions", "be at least one", "none")
        if len(features) != len(captions):
            raise checks.invalid(_OP, "captions", f"be {len(features)}, one for each picture", str(len(captions)))
        config = self.language_model.config
        end = config.eos_token_ids[:1]
        opening = self._tokens(prompt) if prompt else []
        unlabelled = features.shape[1] + len(opening)
        room = config.n_positions - unlabelled - len(end)
        if room < 1:
            contract = f"leave room for a caption in n_positions = {config.n_positions}"
            raise checks.invalid(_OP, "prompt", contract, f"{unlabelled} tokens before it", "shorten it")
        texts = [[*(self._tokens(c) if isinstance(c, str) else list(c))[:room], *end] for c in captions]
        ids = [self.token_ids([IMAGE, opening, text], features.shape[1]) for text in texts]
        x = self._embed(features, torch.cat(ids), self.dropout if self.training else 0.0, seed)
        silent = ids[0].new_full((unlabelled - 1,), IGNORE_INDEX)
        labels = torch.cat([F.pad(torch.cat([silent, row[unlabelled:]]), (0, 1), value=IGNORE_INDEX) for row in ids])
        rows = (labels != IGNORE_INDEX).nonzero().flatten()
        hidden = self.language_model.hidden_states(x, [len(row) for row in ids], rows=rows)
        return self.language_model.loss(hidden, labels[rows]), len(rows)

    def _embed(self, features: Tensor, ids: Tensor, dropout: float = 0.0, seed: int | None = None) -> Tensor:
        """[T] ids and the pictures' features to [T, E], in one launch."""
        model, norm = self.language_model, self.layer_norm
        words = model.wte if model.wte_scales is None else (model.wte, model.wte_scales)
        features, weight, bias = (
            x.to(model.device, model.dtype) for x in (features, self.projection.weight, self.projection.bias)
        )
        return project_concat(
            features, weight, bias, ids[None], words, image_token_id=self.image_token_id,
            dropout_p=dropout, seed=seed,
            layer_norm=None if norm is None else (norm.weight, norm.bias, norm.eps),
        )[0]  # fmt: skip

    def _tokens(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise checks.invalid(_OP, "tokenizer", "be given with texts", "None")
        # A text that spells a special token out, as '<|endoftext|>', means its letters: cut, it is no such token.
        cuts = {m.start() + 1 for x in _specials(self.tokenizer) for m in re.finditer(re.escape(x), text)}
        edges = [0, *sorted(cuts), len(text)]
        ids: list[int] = []
        for start, end in pairwise(edges):  # some tokenizers open or close every text
            ids += self.tokenizer(text[start:end], add_special_tokens=False).input_ids
        return ids


def _specials(tokenizer: Any) -> list[str]:
    return [x for x in getattr(tokenizer, "all_special_tokens", ()) if len(x) > 1]
