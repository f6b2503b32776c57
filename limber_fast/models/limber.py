"""LiMBeR: a frozen image encoder, one linear map into the input space of a frozen GPT-J, and what it then says."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limber_fast import checks
from limber_fast.models import limber_files
from limber_fast.models.encoders import ImageEncoder
from limber_fast.models.gptj import GPTJ
from limber_fast.models.gptj_attention import Prefix
from limber_fast.models.gptj_model import IGNORE_INDEX
from limber_fast.ops.prefix_attention import PAGE_SIZE
from limber_fast.ops.project_concat import project_concat

_OP = "Limber"
# How `caption` and `answer` choose tokens. LiMBeR's own sampler keeps, of the probabilities before the temperature, the
# likeliest tokens up to 1 - 0.9 together: the likeliest alone wherever it has a tenth. So it is all but greedy.
DECODING: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "limber": {"temperature": 0.7, "top_p": 0.1, "nucleus_first": True},
}
IMAGE = object()  # a picture's place in a prompt
Part = Any  # a text, token ids, or IMAGE
Images = Sequence[Any] | Tensor
Shot = tuple[Any, str, str]  # picture or its features [k, D], question, answer


class Limber(nn.Module):
    """``GPT-J([ P f_1 + b, ..., P f_k + b, text ])`` with the encoder's features f of a picture; only P and b train.

    Args:
        encoder: `limber_fast.models.encoders.encoder(...)`; None where features come ready made.
        language_model: frozen, of width E.
        tokenizer: of transformers (`tokenizer(text).input_ids`, `decode`), GPT-2's for GPT-J; needed for texts.
        width: D of the features, by default the encoder's.
        dropout: of the soft prompts in training (LiMBeR: 0.1).
        layer_norm: MAGMA's LayerNorm over the soft prompts, after the dropout.

    Source: Merullo et al., arXiv 2209.15162; Eichenberg et al., arXiv 2112.05253 (MAGMA).
    """

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

    def train(self, mode: bool = True) -> Limber:
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

    def forward(self, images: Images, captions: Sequence[str | Sequence[int]], *, seed: int | None = None) -> Tensor:
        """Mean cross entropy of captions behind their pictures, as LiMBeR trains: ``[picture][caption][end of text]``,
        loss on the caption and the end alone.

        Args:
            images: n pictures or their features. captions: n texts, or token ids.
            seed: of the dropout; by default from torch's generator.

        A caption that does not fit into the language model's context is cut off.

        Returns: 0-d fp32; gradients reach the projection, the LayerNorm and an encoder that is not frozen.
        """
        return self.loss(images, captions, seed=seed)[0]

    def loss(
        self, images: Images, captions: Sequence[str | Sequence[int]], *, seed: int | None = None
    ) -> tuple[Tensor, int]:
        """What `forward` gives, and the number of tokens that it is the mean of."""
        captions = checks.listed_texts(_OP, "captions", captions)
        features = self.encode(images)
        if len(features) != len(captions):
            raise checks.invalid(_OP, "captions", f"be {len(features)}, one for each picture", str(len(captions)))
        config = self.language_model.config
        end = config.eos_token_ids[:1]
        room = config.n_positions - features.shape[1] - len(end)
        texts = [[*(self._tokens(c) if isinstance(c, str) else list(c))[:room], *end] for c in captions]
        ids = [self.token_ids([IMAGE, text], features.shape[1]) for text in texts]
        x = self._embed(features, torch.cat(ids), self.dropout if self.training else 0.0, seed)
        hidden = self.language_model.hidden_states(x, [len(row) for row in ids])
        following = torch.cat([F.pad(row[1:], (0, 1), value=IGNORE_INDEX) for row in ids])
        labels = following.masked_fill(following == self.image_token_id, IGNORE_INDEX)
        return self.language_model.loss(hidden, labels), int((labels != IGNORE_INDEX).sum())

    def caption(
        self, images: Images, prompt: str = "A picture of", *, decoding: str = "greedy", max_new_tokens: int = 100,
        seed: int | None = 0, on_token: Callable[[int, int, str], None] | None = None, **options: Any,
    ) -> list[str]:  # fmt: skip
        """What the model says behind each picture and `prompt`, without the prompt.

        Args:
            images: PIL images, preprocessed [n, 3, H, W], or features [n, k, D].
            decoding: a name in `DECODING`: 'greedy', or 'limber' for the paper's near-greedy sampler.
            max_new_tokens, seed, on_token, options: of `GPTJ.generate`; options outrank `decoding`.
        """
        if not isinstance(images, Tensor) and hasattr(images, "__len__") and not len(images):
            return []
        features = self.encode(images)
        prompts = [[IMAGE, *([prompt] if prompt else [])]] * len(features)
        return self._say(features, prompts, decoding, max_new_tokens, seed=seed, on_token=on_token, **options)

    @torch.no_grad()
    def prefix(self, shots: Sequence[Shot], *, separator: str = "\n", room: int = 16_384) -> Prefix:
        """The shots of `answer`, computed once for any number of calls: a context manager that gives its memory back.

        Args: as in `answer`; room: of `GPTJ.prefix`.
        """
        if not len(shots):
            raise checks.invalid(f"{_OP}.prefix", "shots", "be at least one", "none")
        shots = list(shots)
        ready = [self.encode(x[None] if isinstance(x, Tensor) else [x]) for x, _, _ in shots]
        parts = [part for _, q, a in shots for part in (IMAGE, f"Q: {q} A: {a}{separator}")]
        rows, _ = self.inputs_embeds(torch.cat(ready), [parts])
        return self.language_model.prefix(inputs_embeds=rows, room=room)

    def answer(
        self, images: Images, questions: Sequence[str], shots: Sequence[Shot] = (), *, prefix: Prefix | None = None,
        decoding: str = "greedy", max_new_tokens: int = 10, separator: str = "\n", seed: int | None = 0, **options: Any,
    ) -> list[str]:  # fmt: skip
        """Answers to one question for each picture: ``[picture] Q: question A:`` behind the shots.

        Args:
            images: n pictures or their features. questions: n.
            shots: (picture or its features [k, D], question, answer), shown before every question, in this order. They
                are computed once, and every question goes on from there.
            prefix: of `self.prefix(shots)`, in the place of shots, where more calls follow.
            separator: behind each shot; what ends an answer too (LiMBeR published neither).
            decoding, max_new_tokens, seed, options: as in `caption`.
        """
        questions, shots = checks.listed_texts(_OP, "questions", questions), list(shots)
        options = {"seed": seed, **options}
        features = self.encode(images)
        if len(features) != len(questions):
            raise checks.invalid(_OP, "questions", f"be {len(features)}, one for each picture", str(len(questions)))
        if shots and prefix is not None:
            raise checks.invalid(_OP, "prefix", "take the place of shots", "both")
        prompts = [[IMAGE, f"Q: {question} A:"] for question in questions]
        if separator and not options.get("stop_strings"):
            options["stop_strings"] = separator
        if not shots:
            return self._say(features, prompts, decoding, max_new_tokens, prefix=prefix, **options)
        tokens = sum(len(self.token_ids(prompt, features.shape[1])) for prompt in prompts)
        room = max(1, tokens + len(prompts) * (max_new_tokens + PAGE_SIZE))
        with self.prefix(shots, separator=separator, room=room) as prefix:
            return self._say(features, prompts, decoding, max_new_tokens, prefix=prefix, **options)

    def _say(
        self, features: Tensor, prompts: list[list[Part]], decoding: str, max_new_tokens: int, **options: Any
    ) -> list[str]:
        checks.choice(_OP, "decoding", decoding, tuple(DECODING))
        if self.tokenizer is None:
            raise checks.invalid(_OP, "tokenizer", "be given where texts are wanted", "None")
        if not prompts:
            return []
        with torch.no_grad():
            rows, lengths = self.inputs_embeds(features, prompts)
        found = self.language_model.generate(
            inputs_embeds=list(rows.split(lengths)), max_new_tokens=max_new_tokens, tokenizer=self.tokenizer,
            **{**DECODING[decoding], **options},
        )  # fmt: skip
        return [text.strip() for text in found.texts]

    def _embed(self, features: Tensor, ids: Tensor, dropout: float = 0.0, seed: int | None = None) -> Tensor:
        """[T] ids and the pictures' features to [T, E], in one launch."""
        model, norm = self.language_model, self.layer_norm
        features, weight, bias = (
            x.to(model.device, model.dtype) for x in (features, self.projection.weight, self.projection.bias)
        )
        return project_concat(
            features, weight, bias, ids[None], model.wte, image_token_id=self.image_token_id,
            dropout_p=dropout, seed=seed,
            layer_norm=None if norm is None else (norm.weight, norm.bias, norm.eps),
        )[0]  # fmt: skip

    def _tokens(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise checks.invalid(_OP, "tokenizer", "be given with texts", "None")
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)  # some open or close every text

    def load_projection(self, path: str | os.PathLike[str]) -> Limber:
        """P and b from LiMBeR's proj.ckpt (exactly the keys weight and bias), read with weights_only."""
        limber_files.load_projection(self.projection, Path(path))
        return self

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes limber.json and projection.safetensors: what was trained, and what it was trained for. The encoder and
        the language model are not copied."""
        limber_files.save(self, Path(folder))

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], language_model: GPTJ, tokenizer: Any = None,
        encoder: ImageEncoder | str | None = "saved",
    ) -> Limber:  # fmt: skip
        """A saved Limber on `language_model`, with the encoder of the saved name unless another, or None, is given."""
        return limber_files.load(cls, Path(folder), language_model, tokenizer, encoder)
