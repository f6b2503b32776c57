"""Every broken contract of GPTJ is one clear error, before anything is computed."""

from __future__ import annotations

import pytest
import torch

from limber_fast import GPTJ, GPTJConfig

IDS, MASK = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[1, 1, 1], [0, 0, 0]])
EMBEDS = torch.zeros(2, 3, 84)

FORWARD = {
    "nothing": (dict(), r"input_ids or inputs_embeds must be given, exactly one of them; got neither"),
    "both": (dict(input_ids=IDS, inputs_embeds=EMBEDS), r"exactly one of them; got input_ids and inputs_embeds"),
    "one sequence": (dict(input_ids=IDS[0]), r"input_ids must be \[B, S\], none of them 0; got shape \(3,\)"),
    "empty": (dict(input_ids=IDS[:, :0]), r"input_ids must be \[B, S\], none of them 0; got shape \(2, 0\)"),
    "unknown id": (dict(input_ids=IDS + 297), r"input_ids must lie within \[0, V\) with V = 301; got ids from 298"),
    "negative id": (dict(input_ids=IDS - 2), r"input_ids must lie within \[0, V\) with V = 301; got ids from -1 to 4"),
    "narrow": (dict(inputs_embeds=EMBEDS[..., :5]), r"inputs_embeds must be as wide as the model, E = 84; got shape"),
    "mask": (dict(input_ids=IDS, attention_mask=MASK[:1]), r"attention_mask must be \(2, 3\), one value per token"),
    "empty row": (dict(input_ids=IDS, attention_mask=MASK), r"attention_mask must leave at least one token in every"),
    "labels": (dict(input_ids=IDS, labels=IDS[:, :2]), r"labels must be \(2, 3\), one value per token; got shape"),
    "unknown label": (dict(input_ids=IDS, labels=IDS + 298), r"labels must lie in \[0, V\) with V = 301, or be i"),
    "positions": (dict(input_ids=IDS, position_ids=IDS[0]), r"position_ids must be \(2, 3\)"),
    "far position": (dict(input_ids=IDS, position_ids=IDS + 90), r"sequence must have at most n_positions = 96"),
    "negative position": (dict(input_ids=IDS, position_ids=IDS - 2), r"position_ids must not be negative; got -1"),
    "too long": (
        dict(input_ids=torch.ones(1, 97, dtype=torch.long)),
        r"the sequence must have at most n_positions = 96 tokens; got 97; shorten the prompt",
    ),
}  # fmt: skip

FORWARD_KINDS = {
    "float ids": (dict(input_ids=IDS.float()), r"input_ids must be an integer tensor; got torch.float32"),
    "a list": (dict(input_ids=IDS.tolist()), r"input_ids must be a tensor \[B, S\]; got list"),
    "integer embeddings": (
        dict(inputs_embeds=EMBEDS.long()),
        r"inputs_embeds must be fp16, bf16, fp32 or fp64; got tor",
    ),
    "float mask": (
        dict(input_ids=IDS, attention_mask=MASK.float()),
        r"attention_mask must be integers; got torch.float3",
    ),
}

GENERATE = {
    "no prompt": (dict(), r"GPTJ.generate: input_ids or inputs_embeds must be given, exactly one"),
    "empty prompt": (
        dict(input_ids=[[1, 2], []]),
        r"every prompt of input_ids must be \[S\], none of them 0; got shape",
    ),
    "text without tokenizer": (dict(input_ids="a dog"), r"tokenizer must be given with prompts of text; got None"),
    "stop without tokenizer": (
        dict(input_ids=[1], stop_strings="x"),
        r"tokenizer must be given with stop_strings; got No",
    ),
    "empty stop": (dict(input_ids=[1], stop_strings=""), r"stop_strings must be texts, none of them empty"),
    "mask of a list": (
        dict(input_ids=[[1]], attention_mask=MASK),
        r"attention_mask must go with a tensor of prompts; got",
    ),
    "no tokens": (dict(input_ids=[1], max_new_tokens=0), r"max_new_tokens must be a whole number of at least 1; got 0"),
    "temperature": (dict(input_ids=[1], temperature=-1), r"temperature must not be negative; got -1"),
    "greedy nucleus": (
        dict(input_ids=[1], top_p=0.9),
        r"top_p must go with a temperature; got temperature 0, which is gre",
    ),
    "top_p": (dict(input_ids=[1], temperature=1.0, top_p=1.1), r"top_p must lie within \(0, 1\]; got 1.1"),
    "top_k": (dict(input_ids=[1], temperature=1.0, top_k=0), r"top_k must be a whole number of at least 1; got 0"),
    "repetition": (
        dict(input_ids=[1], repetition_stop=1),
        r"repetition_stop must be a whole number of at least 2; got 1",
    ),
    "too long": (dict(input_ids=[1] * 90, max_new_tokens=7), r"got 7 behind 90 tokens of prompt 0; at most 6 fit"),
}


@pytest.mark.parametrize("case", FORWARD)
def test_bad_values(tiny_int8, case):
    arguments, said = FORWARD[case]
    with pytest.raises(ValueError, match=said):
        tiny_int8(**arguments)


@pytest.mark.parametrize("case", FORWARD_KINDS)
def test_bad_kinds(tiny_int8, case):
    arguments, said = FORWARD_KINDS[case]
    with pytest.raises(TypeError, match=said):
        tiny_int8(**arguments)


@pytest.mark.parametrize("case", GENERATE)
def test_bad_generation(tiny_int8, case):
    arguments, said = GENERATE[case]
    with pytest.raises(ValueError, match=said):
        tiny_int8.generate(**arguments)


def test_cache_of_another_batch_and_of_the_full_context(tiny_int8):
    with pytest.raises(ValueError, match="cache must hold one sequence per row, 2; got 3"):
        tiny_int8(IDS, cache=tiny_int8.new_cache(3))
    cache = tiny_int8.new_cache(1)
    with torch.no_grad():
        tiny_int8(torch.ones(1, 96, dtype=torch.long), cache=cache)
        with pytest.raises(
            ValueError, match="at most n_positions = 96 tokens; got 97; shorten it or generate fewer tokens"
        ):
            tiny_int8(IDS[:1, :1], cache=cache)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (dict(n_embd=100, n_head=3), "n_embd must be a multiple of n_head = 3; got 100"),
        (
            dict(n_embd=64, n_head=4, rotary_dim=18),
            "rotary_dim must be even and at most 16, the width of a head; got 18",
        ),
        (dict(rotary_dim=None), "rotary_dim must be a whole number of at least 1; got None"),
        (dict(n_layer=0), "n_layer must be a whole number of at least 1; got 0"),
        (dict(layer_norm_epsilon=-1.0), "layer_norm_epsilon must not be negative"),
    ],
)
def test_impossible_sizes(sizes, said):
    with pytest.raises(ValueError, match=said):
        GPTJConfig(**sizes)


def test_unknown_precision():
    config = GPTJConfig(vocab_size=8, n_embd=8, n_head=1, n_layer=1, rotary_dim=4)
    for how, said in (
        (dict(weights="int4"), "weights must be one of 'float', 'int8'"),
        (dict(compute="fast"), "compute"),
    ):
        with pytest.raises(ValueError, match=said):
            GPTJ(config, **how)
    with pytest.raises(TypeError, match=r"dtype must be torch.bfloat16"):
        GPTJ(config, dtype=torch.int8)
    with pytest.raises(ValueError, match="compute must be one of 'w8a16', 'w8a8'; got 'w4'"):
        GPTJ.from_config(config).compute = "w4"
