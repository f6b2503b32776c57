"""The forward pass of a frozen GPT-J: hidden states, logits, loss, and gradients of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from limber_fast import checks
from limber_fast.models.gptj_attention import KVCache, cached_attention, rotations
from limber_fast.models.gptj_causal import differentiable_attention
from limber_fast.models.gptj_config import GPTJConfig
from limber_fast.models.gptj_layers import COMPUTE, KINDS, Adapter, Block, FrozenLayerNorm, FrozenLinear, Precision
from limber_fast.models.gptj_weights import small_normal_
from limber_fast.ops.frozen_cross_entropy import frozen_cross_entropy
from limber_fast.ops.int8_weight import Int8Weight

_OP = "GPTJ"
IGNORE_INDEX = -100


@dataclass
class GPTJOutput:
    """What a forward pass gives.

    Attributes:
        loss: mean cross entropy over the labelled tokens, fp32; None without labels.
        cache: the KVCache that was passed in, or None.
        hidden: [B, S, E] (or of the last `logits_to_keep` tokens), after the last LayerNorm; zeros where the attention
            mask is 0.
    """

    hidden: Tensor
    loss: Tensor | None
    cache: KVCache | None
    head: nn.Module = field(repr=False)

    @cached_property
    def logits(self) -> Tensor:
        """[B, S, V] of `hidden`, in the model's dtype. Computed when first asked for: training and decoding never hold
        it whole; for some positions take `model.lm_head(output.hidden[...])`."""
        return self.head(self.hidden)


class FrozenGPTJ(nn.Module):
    """The layers and their forward pass; `limber_fast.GPTJ` adds where weights come from, and generation.

    Attributes:
        gradient_checkpointing: keep the input of each block alone for the backward pass, and compute the block again.
        shared_batch: of `GPTJ.keep_prefixes`, or None.
    """

    def __init__(
        self, config: GPTJConfig, *, weights: str = "int8", compute: str = "w8a16", outlier_threshold: float = 6.0,
        kv_cache: str = "float", embedding: str = "float", dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config, self.precision = config, Precision(weights, dtype, compute, outlier_threshold, kv_cache, embedding)
        (rows, width), rounded = (config.vocab_size, config.n_embd), embedding == "int8"
        self.register_buffer("wte", torch.empty(rows, width, dtype=torch.int8 if rounded else dtype, device=device))
        self.register_buffer("wte_scales", torch.empty(rows, device=device) if rounded else None)
        self.h = nn.ModuleList(Block(config, self.precision, device) for _ in range(config.n_layer))
        self.ln_f = FrozenLayerNorm(width, config.layer_norm_epsilon, dtype, device)
        self.lm_head = FrozenLinear(config.vocab_size, width, True, self.precision, device)
        self.gradient_checkpointing, self.shared_batch = False, None
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        return self.ln_f.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.wte.device

    @property
    def compute(self) -> str:
        return self.precision.compute

    @compute.setter
    def compute(self, value: str) -> None:
        checks.choice(_OP, "compute", value, COMPUTE)
        self.precision.compute = value
        self._forget()

    @property
    def kv_cache(self) -> str:
        return self.precision.kv_cache

    @kv_cache.setter
    def kv_cache(self, value: str) -> None:
        checks.choice(_OP, "kv_cache", value, KINDS)
        self.precision.kv_cache = value

    @property
    def kv_dtype(self) -> torch.dtype:
        """Of the keys and values in caches made from now on."""
        return torch.int8 if self.kv_cache == "int8" else self.dtype

    @property
    def adapters(self) -> nn.ModuleDict:
        """MAGMA's adapters by layer; empty where there are none."""
        return nn.ModuleDict({str(i): block.adapter for i, block in enumerate(self.h) if block.adapter is not None})

    def add_adapters(self, width: int | None = None, *, seed: int = 0) -> None:
        """Puts an adapter of `width` (by default E / 4, as MAGMA) behind every MLP: random ones that hardly change
        anything, frozen until `train_adapters`."""
        width = self.config.n_embd // 4 if width is None else width
        checks.size(f"{_OP}.add_adapters", "width", width)
        if self.config.adapter_width is not None:
            found = f"adapters of width {self.config.adapter_width}"
            raise checks.invalid(f"{_OP}.add_adapters", "the model", "have none yet", found)
        self.attach_adapters(self.new_adapters(width, seed))

    def new_adapters(self, width: int, seed: int = 0) -> nn.ModuleDict:
        """Adapters as `adapters` has them, not yet behind the MLPs."""
        generator = torch.Generator(self.device).manual_seed(seed)
        made = [Adapter(self.config.n_embd, width, self.dtype, self.device) for _ in self.h]
        for p in nn.ModuleList(made).parameters():
            small_normal_(p.data, generator)
        return nn.ModuleDict({str(i): adapter for i, adapter in enumerate(made)})

    def attach_adapters(self, adapters: nn.ModuleDict) -> None:
        for block, adapter in zip(self.h, adapters.values(), strict=True):
            block.adapter = adapter
        self.config = replace(self.config, adapter_width=self.h[0].adapter.down.out_features)
        self._forget()

    def _forget(self) -> None:
        """Kept keys and values are those of another model now."""
        if self.shared_batch is not None:
            self.shared_batch.tree.clear()

    def train_adapters(self, mode: bool = True) -> None:
        """Adapters with gradients, kept in fp32, or frozen ones in the model's dtype."""
        if mode and self.config.adapter_width is None:
            raise checks.invalid(f"{_OP}.train_adapters", "the model", "have adapters", "none", "add_adapters()")
        self._forget()
        self.adapters.to(torch.float32 if mode else self.dtype).requires_grad_(mode)

    def new_cache(self, batch: int, capacity: int | None = None) -> KVCache:
        """An empty cache for `forward`: `batch` sequences of up to `capacity` tokens each, by default n_positions.
        Memory is taken as it fills."""
        checks.size(_OP, "batch", batch)
        capacity = self.config.n_positions if capacity is None else capacity
        checks.size(_OP, "capacity", capacity)
        return KVCache.for_tokens(self.config, [capacity] * batch, self.kv_dtype, self.device)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Rows of the embedding: ids [...] -> [..., E]."""
        checks.ids_in_vocabulary(_OP, "input_ids", input_ids, self.config.vocab_size)
        return self.rows_of(input_ids)

    def rows_of(self, ids: Tensor) -> Tensor:
        found = F.embedding(ids, self.wte)
        return found if self.wte_scales is None else (found * self.wte_scales[ids][..., None]).to(self.dtype)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
    ) -> GPTJOutput:
        """Hidden states, loss and, on demand, logits of B sequences.

        Args:
            input_ids: [B, S] integers; or
            inputs_embeds: [B, S, E] floating point, converted to the model's dtype. Its gradient trains soft prompts.
            attention_mask: [B, S], 0 or False for tokens that are not there: padding on either side, or holes. They are
                not computed, and nothing attends to them.
            position_ids: [B, S] integers; by default 0, 1, ... S - 1, after a cache from where each sequence stopped.
                Rotary attention sees differences alone.
            labels: [B, S] integers, shifted inside: token s is held against labels[:, s + 1]; -100 is ignored, as are
                the predictions of masked tokens.
            cache: of `new_cache`: what it holds comes before these tokens, which are added to it. Without gradients.
            logits_to_keep: hidden states and logits of so many last tokens alone, 0 for all of them. Of the others
                (that no label follows) the last block then computes its attention alone: 3/4 of its products less.

        Returns: GPTJOutput with loss, logits (computed when read), hidden and cache.
        Raises: ValueError or TypeError for arguments that break this; a sequence longer than n_positions.
        """
        checks.exactly_one(_OP, input_ids=input_ids, inputs_embeds=inputs_embeds)
        if input_ids is not None:
            checks.whole_rows(_OP, "input_ids", input_ids, "[B, S]", self.wte)
            x = self.embed(input_ids)
        else:
            checks.whole_rows(_OP, "inputs_embeds", inputs_embeds, "[B, S, E]", self.wte)
            checks.embeddings(_OP, "inputs_embeds", inputs_embeds, self.config.n_embd)
            x = inputs_embeds.to(self.dtype)
        batch, length = shape = x.shape[:2]
        checks.within_context(_OP, length, self.config.n_positions)
        kept = self._kept(attention_mask, shape)
        lengths = [length] * batch if kept is None else kept.sum(1).tolist()
        checks.no_empty_row(_OP, "attention_mask", lengths)
        if cache is not None:
            checks.fits_cache(_OP, batch, cache.lengths)
        positions = position_ids
        if position_ids is not None:
            checks.beside(_OP, "position_ids", position_ids, shape, self.wte)
        elif kept is not None and (cache is None or not any(cache.lengths)):
            positions = torch.arange(length, device=self.device).expand(shape)  # holes count
        if labels is not None:
            checks.beside(_OP, "labels", labels, shape, self.wte)
            checks.vocabulary_labels(_OP, labels, IGNORE_INDEX, self.config.vocab_size)
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        if logits_to_keep != 0:
            checks.size(_OP, "logits_to_keep", logits_to_keep)
        first = max(length - logits_to_keep, 0) if logits_to_keep else 0

        def packed(x: Tensor) -> Tensor:
            return x.flatten(0, 1) if kept is None else x[kept]

        rows = None
        if first:
            shown = torch.arange(length, device=self.device).expand(shape) >= first
            wanted = packed(shown if labels is None else shown | (labels != IGNORE_INDEX))
            rows = wanted.nonzero().flatten()
        hidden = self.hidden_states(
            packed(x), lengths, None if positions is None else packed(positions), cache, rows=rows
        )
        loss = None
        if labels is not None:
            loss = self.loss(hidden, packed(labels) if rows is None else packed(labels)[rows])
        if rows is not None:
            hidden = hidden[packed(shown)[rows]]
        if kept is None:
            hidden = hidden.view(batch, length - first, -1)
        else:
            kept = kept[:, first:]
            hidden = hidden.new_zeros(*kept.shape, hidden.shape[-1]).masked_scatter(kept[..., None], hidden)
        return GPTJOutput(hidden, loss, cache, self.lm_head)

    def _kept(self, attention_mask: Tensor | None, shape: torch.Size) -> Tensor | None:
        """[B, S] bool, None where all tokens are."""
        if attention_mask is None:
            return None
        checks.beside(_OP, "attention_mask", attention_mask, shape, self.wte)
        kept = attention_mask != 0
        return None if kept.all() else kept

    def hidden_states(
        self, x: Tensor, lengths: Sequence[int], positions: Tensor | None = None, cache: KVCache | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The packed core of `forward`: [T, E], after the last LayerNorm.

        Args:
            x: [T, E] in the model's dtype, T = sum(lengths): the tokens of B sequences, one after another.
            lengths: tokens of each sequence. positions: [T] integers, by default where each sequence stopped.
            cache: as in `forward`.
            rows: [R] integers, the tokens whose states are asked for, [R, E]; by default all. Behind its attention the
                last block computes no others.
        """
        config, starts = self.config, [0] * len(lengths) if cache is None else cache.positions
        if positions is None:
            lowest, highest = 0, max(start + n for start, n in zip(starts, lengths, strict=True)) - 1
        else:
            lowest, highest = int(positions.min()), int(positions.max())
        if lowest < 0:
            raise checks.invalid(_OP, "position_ids", "not be negative", str(lowest))
        checks.within_context(_OP, highest + 1, config.n_positions, "shorten it or generate fewer tokens")
        if cache is None:
            if positions is None:
                positions = torch.cat([torch.arange(n, device=self.device) for n in lengths])
            return self._blocks(x, differentiable_attention(config, lengths, rotations(config, positions)), rows)
        with cache.step(lengths, None if positions is None else positions.tolist()) as batch:
            return self._blocks(x, cached_attention(config, cache, batch), rows)

    def fill(self, cache: KVCache, x: Tensor, lengths: Sequence[int]) -> None:
        """Adds keys and values of tokens x [T, E], T = sum(lengths), to the cache; arguments of `hidden_states`."""
        self.hidden_states(x, lengths, cache=cache, rows=torch.empty(0, dtype=torch.int64, device=self.device))

    def _blocks(self, x: Tensor, attend: Callable[[Tensor, int], Tensor], rows: Tensor | None) -> Tensor:
        again, last = self.gradient_checkpointing and torch.is_grad_enabled(), len(self.h) - 1
        for index, block in enumerate(self.h):
            given = x, partial(attend, layer=index), rows if index == last else None
            if again and x.requires_grad:
                x = checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*given)
        return self.ln_f(x)

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy, fp32, of hidden [T, E] against labels [T]; only labelled rows meet the head."""
        head = self.lm_head
        if isinstance(head.weight, Int8Weight):
            return frozen_cross_entropy(hidden, head.weight, head.bias, labels, ignore_index=IGNORE_INDEX)
        labelled = labels != IGNORE_INDEX
        return F.cross_entropy(head(hidden[labelled]).float(), labels[labelled].long())
