"""The tool that trains the demo's language model: what it makes of text before a step is taken."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import make_language_model

    return make_language_model


@pytest.fixture
def text(tool):
    import language_model_text

    return language_model_text


@pytest.fixture
def corpus(text):
    return text.Corpus(3)


def test_lines_are_of_one_concept(text, corpus):
    by_name = {concept.name: concept for concept in corpus.concepts}
    for line in [corpus.caption() for _ in range(300)]:
        assert line.asked == text.PROMPT and line.answer in by_name and len(line.words.split()) <= text.MOST_WORDS
        if line.blur:
            assert line.blur[0][0] == line.answer and len(line.blur) - 1 in (text.OTHERS, text.OTHERS + 1)
            assert 0.7 <= math.sqrt(sum(weight**2 for _, weight in line.blur)) <= 1.4
    blurred = [bool(corpus.caption().blur) for _ in range(2000)]
    assert abs(sum(blurred) / 2000 - text.BLURRED) < 0.05


def test_blurred_places_hold_the_weighted_names(tool, text, corpus):
    tokenizer = text.make_tokenizer(corpus, 600)
    documents = [[corpus.caption()] for _ in range(6)] + [[corpus.question("group") for _ in range(3)]]
    lines = [line for document in documents for line in document]
    (batch,) = text.batches_of(documents, tokenizer, len(documents))
    ids, labels, blur = batch
    wte = torch.nn.Embedding(tokenizer.get_vocab_size(), 16).double()
    model = SimpleNamespace(transformer=SimpleNamespace(wte=wte))
    blur = blur._replace(weights=blur.weights.double())
    found = tool.embedded(model, ids, blur).flatten(0, 1)

    centre = wte(blur.named).mean(0)
    expected = []
    for line in sorted((line for line in lines if line.blur), key=lambda line: line.blur[0][0]):
        names = torch.stack([wte(torch.tensor(text.name_tokens(tokenizer, name))) for name, _ in line.blur])
        weights = torch.tensor([weight for _, weight in line.blur]).double()
        expected.append(centre + torch.einsum("r,rke->ke", weights, names - centre))
    blurred = found[blur.places].unflatten(0, (-1, text.SOFT_PROMPTS))
    assert len(expected) == len(blurred) > 0
    for rows in blurred:  # documents were sorted by length
        assert min((rows - other).abs().max() for other in expected) < 1e-6
    others = torch.ones(len(found), dtype=torch.bool)
    others[blur.places] = False
    assert torch.equal(found[others], wte(ids).flatten(0, 1)[others])
    said = [tokenizer.decode(row[label != text.IGNORED].tolist()) for row, label in zip(ids, labels, strict=True)]
    for answers in said:
        assert any(all(line.answer in answers for line in document) for document in documents)
