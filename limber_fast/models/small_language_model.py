"""The demo's language model: a GPT-J of 2.9 M parameters, trained on text alone by tools/make_language_model.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from limber_fast.models.gptj import GPTJ
from limber_fast.optional import needed

FOLDER = Path(__file__).parent.parent / "data" / "language_model"


def small_language_model(folder: Path = FOLDER) -> tuple[GPTJ, Any]:
    """(the int8 model, its tokenizer)."""
    transformers = needed("transformers", "the demo's language model")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    return GPTJ.from_pretrained(folder), tokenizer
