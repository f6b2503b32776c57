"""LiMBeR: a frozen image encoder, one linear map into the input space of a frozen GPT-J, and what it then says."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limber_fast import checks
from limber_fast.cache import page_size_of
from limber_fast.models import limber_files
from limber_fast.models.encoders import ImageEncoder
from limber_fast.models.gptj import GPTJ, GPTJConfig
from limber_fast.models.gptj_attention import Prefix
from limber_fast.models.limber_model import IMAGE, Images, LimberModel, Part

__all__ = ["DECODING", "IMAGE", "Limber"]

_OP = "Limber"
# How `caption` and `answer` choose tokens. LiMBeR's own sampler keeps, of the probabilities before the temperature, the
# likeliest tokens up to 1 - 0.9 together: the likeliest alone wherever it has a tenth. So it is all but greedy.
DECODING: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "limber": {"temperature": 0.7, "top_p": 0.1, "nucleus_first": True},
}
Shot = tuple[Any, str, str]  # picture or its features [k, D], question, answer
OnToken = Callable[[int, int, str], None]
Progress = Callable[[int, int], None]


class Limber(LimberModel):
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

    def caption(
        self, images: Images, prompt: str = "A picture of", *, decoding: str = "greedy", max_new_tokens: int = 100,
        batch_size: int = 32, seed: int | None = 0, on_token: OnToken | None = None, progress: Progress | None = None,
        **options: Any,
    ) -> list[str]:  # fmt: skip
        """What the model says behind each picture and `prompt`, without the prompt.

        Args:
            images: PIL images, preprocessed [n, 3, H, W], or features [n, k, D].
            decoding: a name in `DECODING`: 'greedy', or 'limber' for the paper's near-greedy sampler.
            batch_size: pictures that are encoded and captioned at a time. It bounds memory and changes no draw.
            on_token: called as (picture, token, text) with every token, as by `GPTJ.generate`.
            progress: called as (captions done, n) behind every batch.
            max_new_tokens, seed, options: of `GPTJ.generate`; options outrank `decoding`.
        """
        prompt_parts = [IMAGE, *([prompt] if prompt else [])]
        options |= {"max_new_tokens": max_new_tokens, "seed": seed, "on_token": on_token}
        return self._say(images, None, lambda row: prompt_parts, decoding, batch_size, progress, options)

    @torch.no_grad()
    def prefix(self, shots: Sequence[Shot], *, separator: str = "\n", room: int = 16_384) -> Prefix:
        """The shots of `answer`, computed once for any number of calls: a context manager that gives its memory back.

        Args: as in `answer`; room: of `GPTJ.prefix`.
        """
        if not (shots := checks.shots(f"{_OP}.prefix", shots)):
            raise checks.invalid(f"{_OP}.prefix", "shots", "be at least one", "none")
        ready = [self.encode(x[None] if isinstance(x, Tensor) else [x]) for x, _, _ in shots]
        parts = [part for _, q, a in shots for part in (IMAGE, f"Q: {q} A: {a}{separator}")]
        rows, _ = self.inputs_embeds(torch.cat(ready), [parts])
        return self.language_model.prefix(inputs_embeds=rows, room=room)

    def answer(
        self, images: Images, questions: Sequence[str], shots: Sequence[Shot] = (), *, prefix: Prefix | None = None,
        decoding: str = "greedy", max_new_tokens: int = 10, batch_size: int = 32, separator: str = "\n",
        seed: int | None = 0, on_token: OnToken | None = None, progress: Progress | None = None, **options: Any,
    ) -> list[str]:  # fmt: skip
        """Answers to one question for each picture: ``[picture] Q: question A:`` behind the shots.

        Args:
            images: n pictures or their features. questions: n.
            shots: (picture or its features [k, D], question, answer), shown before every question, in this order. They
                are computed once, and every question goes on from there.
            prefix: of `self.prefix(shots)`, in the place of shots, where more calls follow.
            separator: behind each shot; what ends an answer too (LiMBeR published neither).
            decoding, max_new_tokens, batch_size, seed, on_token, progress, options: as in `caption`.
        """
        questions, images = checks.listed_texts(_OP, "questions", questions), _listed(images)
        shots = checks.shots(_OP, shots)
        if shots and prefix is not None:
            raise checks.invalid(_OP, "prefix", "take the place of shots", "both")
        options |= {"max_new_tokens": max_new_tokens, "seed": seed, "on_token": on_token}
        if separator and not options.get("stop_strings"):
            options["stop_strings"] = separator

        def prompt(row: int) -> list[Part]:
            return [IMAGE, f"Q: {questions[row]} A:"]

        def say(prefix: Prefix | None) -> list[str]:
            options["prefix"] = prefix
            return self._say(images, questions, prompt, decoding, batch_size, progress, options)

        if not shots or not questions:
            return say(prefix)
        checks.size(_OP, "batch_size", batch_size)
        checks.size(_OP, "max_new_tokens", max_new_tokens)
        longest = sorted((len(self._tokens(f"Q: {question} A:")) for question in questions), reverse=True)[:batch_size]
        soft = images.shape[1] if self.encoder is None else self.encoder.tokens
        room = sum(n + soft + max_new_tokens + page_size_of(self.language_model.kv_dtype) for n in longest)
        with self.prefix(shots, separator=separator, room=max(1, room)) as prefix:
            return say(prefix)

    @torch.no_grad()
    def _say(
        self, images: Images, questions: Sequence[str] | None, prompt: Callable[[int], list[Part]], decoding: str,
        batch_size: int, progress: Progress | None, options: dict[str, Any],
    ) -> list[str]:  # fmt: skip
        """Texts behind prompt(0), prompt(1), ..., a batch at a time."""
        checks.choice(_OP, "decoding", decoding, tuple(DECODING))
        checks.size(_OP, "batch_size", batch_size)
        if self.tokenizer is None:
            raise checks.invalid(_OP, "tokenizer", "be given where texts are wanted", "None")
        count = len(images := _listed(images))
        if questions is not None and len(questions) != count:
            raise checks.invalid(_OP, "questions", f"be {count}, one for each picture", str(len(questions)))
        if not count:
            return []
        seed, on_token = options.pop("seed"), options.pop("on_token")
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        found: list[str] = []
        for start in range(0, count, batch_size):
            features = self.encode(images[start : start + batch_size])
            prompts = [prompt(start + row) for row in range(len(features))]
            rows, lengths = self.inputs_embeds(features, prompts)
            told = None if on_token is None else _shifted(on_token, start)
            said = self.language_model.generate(
                inputs_embeds=list(rows.split(lengths)), tokenizer=self.tokenizer, seed=seed + start, on_token=told,
                **{**DECODING[decoding], **options},
            )  # fmt: skip
            found += [text.strip() for text in said.texts]
            if progress is not None:
                progress(len(found), count)
        return found

    def load_projection(self, path: str | os.PathLike[str]) -> Limber:
        """P and b from LiMBeR's proj.ckpt (exactly the keys weight and bias), read with weights_only."""
        limber_files.load_projection(self.projection, Path(path))
        return self

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes limber.json and one file of tensors, an older Limber there being replaced in one rename: the map, the
        LayerNorm, adapters, and an encoder that was tuned. Of a library's encoder and of the language model the folder
        has nothing but, of the former, the name, and the absolute path of a file of its weights."""
        limber_files.save(self, Path(folder))

    @classmethod
    def from_magma(
        cls, path: str | os.PathLike[str], tokenizer: Any = None, *, encoder: ImageEncoder | None = None,
        config: GPTJConfig | None = None, device: torch.device | str | None = None, **precision: Any,
    ) -> Limber:  # fmt: skip
        """MAGMA's checkpoint: tuned encoder, projection, LayerNorm, and GPT-J with adapters, quantised on the way.

        Args:
            path: of torch.save, a state dict or DeepSpeed's {'module': state dict}; read with weights_only.
            tokenizer: GPT-2's; MAGMA reads 50258 ids.
            encoder: whose weights are replaced by the file's: by default RN50x16, as MAGMA's.
            config: by default GPT-J-6B with adapters of width 1024.
            precision: weights, compute, outlier_threshold, kv_cache and dtype, as of `GPTJ`.

        Raises: ValueError with one line that names the tensor, what was expected and what was found.
        """
        from limber_fast.models import magma_files
        from limber_fast.models.encoders import encoder as make_encoder

        encoder = make_encoder("clip-random") if encoder is None else encoder
        config = GPTJConfig(adapter_width=1024) if config is None else config
        return magma_files.load(cls, Path(path), tokenizer, encoder, config, device, precision)

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], language_model: GPTJ, tokenizer: Any = None,
        encoder: ImageEncoder | str | None = "saved",
    ) -> Limber:  # fmt: skip
        """A saved Limber on `language_model`, with the encoder of the saved name unless another, or None, is given."""
        return limber_files.load(cls, Path(folder), language_model, tokenizer, encoder)


def _listed(images: Images) -> Images:
    """A tensor as it is, pictures as a checked list, which may be empty."""
    if not isinstance(images, Tensor):
        images = list(images) if hasattr(images, "__iter__") else images
        if images != []:
            checks.pictures(_OP, images)
    return images


def _shifted(on_token: OnToken, start: int) -> OnToken:
    return lambda row, token, text: on_token(start + row, token, text)
