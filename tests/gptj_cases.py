"""Small GPT-Js of transformers with random weights, and Limber over one."""

from __future__ import annotations

import pytest
import torch

from limber_fast import GPTJ, Limber

K, D = 5, 24  # soft prompts of a picture, width of its features
SIZES = {  # widths that are no multiple of a tile; a second one closer to GPT-J's proportions
    "tiny": dict(vocab_size=301, n_positions=96, n_embd=84, n_layer=3, n_head=3, rotary_dim=12),
    "medium": dict(vocab_size=1031, n_positions=256, n_embd=512, n_layer=4, n_head=4, rotary_dim=64),
}


def transformers_gptj(size: str, seed: int = 0):
    """Weights of GPT-J-6B's gain, 0.02 at width 4096; biases and LayerNorms are not at their initial values."""
    transformers = pytest.importorskip("transformers")
    width = SIZES[size]["n_embd"]
    config = transformers.GPTJConfig(
        **SIZES[size], bos_token_id=1, eos_token_id=0, initializer_range=0.02 * (4096 / width) ** 0.5
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.GPTJForCausalLM(config).eval()
    for x in model.parameters():
        x.requires_grad_(False)
        if x.ndim == 1:
            x += 0.1 * torch.randn(x.shape, generator=generator)
    return model


def ids_of(model, batch: int, length: int, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, model.config.vocab_size, (batch, length), generator=generator)


def byte_tokenizer():
    """transformers' tokenizer with GPT-J's byte-level alphabet, without merges: id 0 ends a text, byte b is some id."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, **{letter: i + 1 for i, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def limber_of(theirs, dtype=torch.float32, **options):
    model = GPTJ.from_transformers(theirs, weights="float", dtype=dtype)
    torch.manual_seed(1)
    return Limber(None, model, byte_tokenizer(), width=D, **options).eval()


def features_of(n, seed=0):
    return torch.randn(n, K, D, generator=torch.Generator().manual_seed(seed))
