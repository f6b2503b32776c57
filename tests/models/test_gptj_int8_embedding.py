"""Rows of the embedding in int8: the model is the one whose rows are those integers times their scales."""

from __future__ import annotations

import pytest
import torch
from gptj_cases import ids_of
from test_gptj_files import same

from limber_fast import GPTJ, GPTJConfig, Limber
from limber_fast.models.limber import IMAGE

CONFIG = GPTJConfig(vocab_size=301, n_positions=128, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, eos_token_id=0)


def dense(model: GPTJ) -> torch.Tensor:
    return (model.wte.double() * model.wte_scales.double()[:, None]).to(model.dtype)


def with_rows(model: GPTJ, rows: torch.Tensor) -> GPTJ:
    """The same model with an embedding in floating point."""
    other = GPTJ(CONFIG, dtype=model.dtype)
    other.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("wte")}, strict=False)
    other.wte.copy_(rows)
    return other


def test_rows_of_a_checkpoint_are_rounded(tiny, folders):
    for dtype in (torch.float32, torch.bfloat16):
        model = GPTJ.from_pretrained(folders["shards"], embedding="int8", dtype=dtype)
        true = tiny.transformer.wte.weight.double()
        assert model.wte.dtype == torch.int8 and model.dtype == dtype
        assert torch.equal(model.wte_scales, (true.abs().amax(1) / 127).float())
        step = model.wte_scales.double()[:, None]
        assert ((model.wte * step - true).abs() <= 0.501 * step).all()
        ids = torch.tensor([[3, 0, 300], [7, 7, 1]])
        assert torch.equal(model.embed(ids), dense(model)[ids])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_is_that_of_the_rounded_rows(dtype):
    model = GPTJ.from_config(CONFIG, seed=3, embedding="int8", dtype=dtype)
    assert 0.8 < float(dense(model).float().std()) / CONFIG.initializer_range < 1.2
    other = with_rows(model, dense(model))
    ids = ids_of(model, 2, 9)
    assert torch.equal(model(ids).logits, other(ids).logits)
    prompts = [[5, 6, 7], [9]]
    made = [m.generate(prompts, max_new_tokens=6).tokens for m in (model, other)]
    assert made[0] == made[1]
    features, captions = torch.randn(2, 3, 20), [[4, 5], [6]]
    torch.manual_seed(1)
    ours, theirs = (Limber(None, m, width=20, dropout=0.0) for m in (model, other))
    theirs.load_state_dict(ours.projection.state_dict(prefix="projection."), strict=False)
    assert torch.equal(ours(features, captions), theirs(features, captions))
    rows = [m.inputs_embeds(features, [[IMAGE, [3, 4]], [[8], IMAGE]])[0] for m in (ours, theirs)]
    assert torch.equal(*rows)


def test_saved_as_it_is(tmp_path):
    model = GPTJ.from_config(CONFIG, seed=3, embedding="int8")
    model.save_pretrained(tmp_path)
    for mmap in (True, False):
        assert same(GPTJ.from_pretrained(tmp_path, mmap=mmap), model)
    with pytest.raises(ValueError, match="embedding must be int8, as saved; got float"):
        GPTJ.from_pretrained(tmp_path, embedding="float")
    with pytest.raises(ValueError, match="embedding must be"):
        GPTJ.from_config(CONFIG, embedding="int4")


def test_rows_that_are_not_finite_name_their_tensor(tiny, folders, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folders["one"] / "model.safetensors")
    tensors["transformer.wte.weight"][5, 2] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folders["one"] / "config.json").read_text())
    with pytest.raises(ValueError, match=r"transformer\.wte\.weight.*row 5"):
        GPTJ.from_pretrained(tmp_path, embedding="int8")
