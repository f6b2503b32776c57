"""GPT-J with frozen int8 weights: from a checkpoint or at random, trained through, and generating."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limber_fast import checks
from limber_fast.cache import CacheFull, PagePool, PrefixTree, contents, page_size_of
from limber_fast.models import gptj_files, gptj_generate
from limber_fast.models.gptj_attention import KVCache, Prefix
from limber_fast.models.gptj_batch import CHUNK, ContinuousBatch
from limber_fast.models.gptj_config import GPTJConfig
from limber_fast.models.gptj_generate import Generation, OnToken
from limber_fast.models.gptj_model import FrozenGPTJ, GPTJOutput
from limber_fast.models.gptj_weights import BNB_SCALES, Filling, randomise

__all__ = ["GPTJ", "GPTJConfig", "GPTJOutput", "Generation"]

_OP = "GPTJ"


class GPTJ(FrozenGPTJ):
    """GPT-J, frozen: int8 weights with one scale per output channel (or floating-point ones); no parameter but MAGMA's
    adapters, where there are any (`add_adapters`, `train_adapters`).

    For each block ``h = LayerNorm(x); x = x + out_proj(attention(h)) + fc_out(gelu_new(fc_in(h)))``, then a last
    LayerNorm and the head. Linear maps run over the tokens of all sequences, packed: padding costs nothing. Gradients
    reach `inputs_embeds`, and with them whatever made them (soft prompts); the weights have none.

    Make one by `from_pretrained`, `from_config` or, of an already loaded transformers model, `from_transformers`; the
    constructor leaves the weights uninitialised.

    Args:
        config: the sizes.
        weights: 'int8' or 'float'.
        compute: of `limber_fast.int8_linear`: 'w8a16' or 'w8a8'. `model.compute` may be set later.
        outlier_threshold: the same, of w8a8.
        kv_cache: 'float', or 'int8': keys and values kept in 8 bits, each token's and head's with a scale of its own,
            which is half the memory. `model.kv_cache` may be set later, for caches made from then on; what
            `keep_prefixes` keeps stays of its kind until it is called again.
        embedding: 'float', or 'int8': its rows in 8 bits, each with a scale of its own: 0.2 GB less for GPT-J-6B.
        dtype: of activations, embeddings and LayerNorms, and of 'float' weights.

    Source: Wang and Komatsuzaki, GPT-J-6B (2021); Dettmers et al., arXiv 2208.07339, for the int8 products.
    """

    @classmethod
    def from_config(
        cls, config: GPTJConfig, seed: int = 0, *, device: torch.device | str | None = None, **precision: Any
    ) -> GPTJ:
        """Random weights of standard deviation `initializer_range`, biases 0 and LayerNorms 1, tensor by tensor: int8
        integers are drawn as such, and no floating-point matrix is held. `precision` as in the constructor."""
        model = cls(config, device="meta", **precision)
        randomise(model, seed, device)
        return model

    @classmethod
    def from_transformers(cls, model: nn.Module, *, device: torch.device | str | None = None, **precision: Any) -> GPTJ:
        """The weights of a loaded GPTJForCausalLM (bitsandbytes' int8 layers too), quantised matrix by matrix; the
        model stays as it is. `precision` as in the constructor."""
        source = type(model).__name__
        config = getattr(model, "config", None)
        if not hasattr(config, "to_dict"):
            raise checks.invalid(f"{_OP}.from_transformers", "model", "be a GPTJForCausalLM", source, kind=TypeError)
        result = cls(GPTJConfig.from_dict(config.to_dict(), source), device="meta", **precision)
        filling = Filling(result, source, device)
        tensors = model.state_dict()
        filling.check_names(tensors)
        for name, tensor in tensors.items():
            scales = tensors.get(name.removesuffix(".weight") + BNB_SCALES) if tensor.dtype == torch.int8 else None
            filling.add(name, tensor, scales)
        return filling.done()

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str] | nn.Module, *, weights: str | None = None, compute: str | None = None,
        outlier_threshold: float | None = None, kv_cache: str | None = None, embedding: str | None = None,
        dtype: torch.dtype | None = None, mmap: bool = True, device: torch.device | str | None = None,
    ) -> GPTJ:  # fmt: skip
        """A model from a folder: of `save_pretrained`, or Hugging Face's (safetensors, or .bin by weights_only).

        A Hugging Face checkpoint is quantised shard by shard: beside the int8 model at most one shard is held. Missing,
        additional, mis-shaped or truncated tensors raise before a model exists, and nothing in a file is executed.

        Args:
            source: the folder; or a loaded transformers model, as for `from_transformers`.
            weights, compute, outlier_threshold, kv_cache, embedding, dtype: as in the constructor; by default what was
                saved, and 'int8', 'w8a16', 6.0, 'float', 'float' and bfloat16 for Hugging Face's.
            mmap: of a saved model: leave the weights in the file's pages, shared between processes and read on first
                use, instead of copying them to memory of their own.

        Raises: ValueError with one line that names the file or tensor, what was expected and what was found.
        """
        given = {"weights": weights, "compute": compute, "outlier_threshold": outlier_threshold, "kv_cache": kv_cache,
                 "embedding": embedding, "dtype": dtype}  # fmt: skip
        given = {name: value for name, value in given.items() if value is not None}
        if isinstance(source, nn.Module):
            return cls.from_transformers(source, device=device, **given)
        folder = Path(source)
        found = gptj_files.read_config(folder)
        config = GPTJConfig.from_dict(found, str(folder / "config.json"))
        saved = gptj_files.saved_facts(folder, found)
        if saved is None:
            model = cls(config, device="meta", **given)
            filling = Filling(model, str(folder), device)
            gptj_files.fill_from_folder(filling, folder)
            return filling.done()
        data = saved.pop("data")
        for name in ("weights", "embedding", "dtype"):
            if given.get(name, saved[name]) != saved[name]:
                remedy = "load the original checkpoint instead"
                raise checks.invalid(
                    f"{_OP}.from_pretrained", name, f"be {saved[name]}, as saved", f"{given[name]}", remedy
                )
        model = cls(config, device="meta", **saved | given)
        gptj_files.load(model, data, mmap, device)
        return model

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes config.json and one safetensors file, int8 weights as they are; an older saved model in the folder is
        replaced in one rename, at the end, and other files stay. A failure leaves the folder as it was.

        Raises: ValueError where the folder holds another model. OSError, as for a full disk.
        """
        gptj_files.save(self, Path(folder))

    @torch.no_grad()
    def prefix(
        self, input_ids: str | Sequence[int] | Tensor | None = None, *, inputs_embeds: Tensor | None = None,
        tokenizer: Any = None, room: int = 16_384,
    ) -> Prefix:  # fmt: skip
        """The beginning of later prompts, computed once: `generate(..., prefix=...)` goes on from it.

        Every prompt forks from its pages, which are read once for all of them and copied by nobody; a prompt's own
        tokens lie in pages beside.

        Args:
            input_ids, inputs_embeds, tokenizer: one prompt, as in `generate`.
            room: tokens of all prompts that go on from it at a time, in all; memory is taken as they fill it.
        """
        checks.size(f"{_OP}.prefix", "room", room)
        embeds = None if inputs_embeds is None else [inputs_embeds]
        if isinstance(input_ids, Tensor):
            input_ids = [input_ids.flatten()]
        x, lengths, _ = gptj_generate.packed_prompts(self, input_ids, embeds, None, tokenizer)
        checks.within_context(_OP, lengths[0], self.config.n_positions)
        if self.shared_batch is not None and not any(p.requires_grad for p in self.parameters()):
            return self._shared_prefix(x)
        pages = 64 * page_size_of(self.kv_dtype)  # of prompts that end within a page
        cache = KVCache.for_tokens(self.config, [lengths[0] + room + pages], self.kv_dtype, self.device)
        self.fill(cache, x, lengths)
        return Prefix(cache, self)

    def _shared_prefix(self, x: Tensor) -> Prefix:
        batch, known = self.shared_batch, contents(x)
        with batch.lock:
            sequence = batch.tree.find(known, leave=0)
            try:
                cache = KVCache(batch.pool, [sequence])
                if (len(x) - sequence.length) // batch.pool.page_size + 2 > batch.spare_pages():
                    raise CacheFull(f"{_OP}.prefix: {len(x)} tokens do not fit beside what runs; keep_prefixes(more)")
                if rest := len(x) - sequence.length:
                    self.fill(cache, x[-rest:], [rest])
                whole = len(x) // batch.pool.page_size * batch.pool.page_size  # the last page may still be written
                batch.tree.insert(sequence, known[:whole])
            except BaseException:
                sequence.release()
                raise
        return Prefix(cache, self)

    def generate(
        self,
        input_ids: str | Sequence[Any] | Tensor | None = None,
        *,
        inputs_embeds: Sequence[Tensor] | Tensor | None = None,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 100,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        nucleus_first: bool = False,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        stop_strings: str | Sequence[str] = (),
        repetition_stop: int | None = None,
        tokenizer: Any = None,
        on_token: OnToken | None = None,
        prefix: Prefix | None = None,
        lookup: int = 0,
    ) -> Generation:
        """Continues a batch of prompts, each of its own length.

        Args:
            input_ids: a text or ids, or a list of either (no padding), or a tensor [B, S]; or
            inputs_embeds: a list of [S_b, E], or a tensor [B, S, E]: soft prompts and embedded text.
            attention_mask: [B, S] beside a tensor of prompts, 0 where there is padding, on whichever side.
            max_new_tokens: behind each prompt; together at most n_positions.
            temperature: 0 takes the most likely token; otherwise logits are divided by it and a token is drawn.
            top_k, top_p: draw among the k likeliest tokens, then among the fewest whose probabilities reach p.
            nucleus_first: take the probabilities of top_p before the temperature divides the logits, not after.
            seed: of the draws; row r draws by seed + r, whatever the other rows are. By default torch's generator.
            eos_token_id: end of text, one id or several; by default the config's, () for none.
            stop_strings: end a text that holds one, which is cut off. Needs `tokenizer`.
            repetition_stop: end a text whose last tokens are one phrase, of any length, so many times in a row.
            tokenizer: of transformers: encodes prompts of text, and makes `texts`.
            on_token: called as (row, token, text) with every token; text is what has become certain since, so that all
                pieces together are the row's final text.
            prefix: of `self.prefix`: what comes before every prompt, not computed again.
            lookup: try up to so many tokens at a time that followed the same three before, in the prompt's ids or in
                what was said; the model checks them, so greedy texts stay what they are, but for ties that the rounding
                of larger products decides otherwise (seen in bf16, random weights). 0, or a temperature: none.

        Returns: Generation with tokens, texts and what ended each.
        Raises: ValueError or TypeError for arguments that break this, before anything is computed.
        """
        sampler, stopping = gptj_generate.settings(
            self.config, temperature=temperature, top_k=top_k, top_p=top_p, nucleus_first=nucleus_first,
            eos_token_id=eos_token_id, stop_strings=stop_strings, repetition_stop=repetition_stop, tokenizer=tokenizer,
        )  # fmt: skip
        with torch.no_grad():
            x, lengths, ids = gptj_generate.packed_prompts(
                self, input_ids, inputs_embeds, attention_mask, tokenizer
            )
        if prefix is not None:
            checks.live_prefix(f"{_OP}.generate", prefix, Prefix, self)
        before = 0 if prefix is None else prefix.length
        gptj_generate.check_room(lengths, max_new_tokens, self.config.n_positions, before)
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        trained = any(p.requires_grad for p in self.parameters())  # the next step makes another model of it
        batch, start = None if trained else self.shared_batch, None
        if prefix is not None:
            start = prefix.cache.sequences[0]
            if batch is None or batch.pool is not start.pool:
                batch = ContinuousBatch(self, start.pool, max_batch=len(lengths))
        elif batch is None:
            room = [length + max_new_tokens for length in lengths]
            pool = KVCache.for_tokens(self.config, room, self.kv_dtype, self.device).pool
            batch = ContinuousBatch(self, pool, max_batch=len(lengths))
        requests = []
        try:
            for row, prompt in enumerate(x.split(lengths)):
                told = None if on_token is None else partial(on_token, row)
                how = {"on_token": told, "start": start, "lookup": lookup, "ids": ids[row]}
                requests.append(batch.add(prompt, max_new_tokens, sampler, stopping, seed + row, **how))
            while not all(request.done for request in requests):
                batch.step()
                for request in requests:
                    if request.error is not None:
                        raise request.error
        finally:
            for request in requests:
                request.cancel()
        rows = [request.row for request in requests]
        texts = None if tokenizer is None else [row.text for row in rows]
        return Generation([row.tokens for row in rows], texts, [row.stopped for row in rows])

    def continuous_batch(self, budget_bytes: int, *, max_batch: int = 256, chunk: int = CHUNK) -> ContinuousBatch:
        """Requests that come and go, with keys and values of `budget_bytes`; prompts go on from what earlier ones left
        there."""
        config = self.config
        pool = PagePool(config.n_layer, config.n_head, config.head_dim, dtype=self.kv_dtype, budget_bytes=budget_bytes,
                        device=self.device)  # fmt: skip
        return ContinuousBatch(self, pool, PrefixTree(pool), max_batch=max_batch, chunk=chunk)

    def keep_prefixes(self, budget_bytes: int | None, **options: Any) -> None:
        """From now on `generate` and `prefix` go on from what earlier calls computed of the same tokens or embeddings,
        bit for bit the same, and leave theirs, least recently used first out; None ends it. Figures:
        `shared_batch.stats()`. Options: of `continuous_batch`; also for calls from several threads, which then share
        steps."""
        self.shared_batch = None if budget_bytes is None else self.continuous_batch(budget_bytes, **options)
