"""CLIPScore and RefCLIPScore against their formulas in NumPy, and through scorers."""

import numpy as np
import pytest
import torch

from limber_fast.evaluation.clip_score import clip_score, ref_clip_score, score_captions


def cosine(a, b):
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def by_hand(image, caption, references, owners):
    alone = [2.5 * max(cosine(i, c), 0) for i, c in zip(image, caption, strict=True)]
    both = []
    for row, score in enumerate(alone):
        best = max(max(cosine(caption[row], r) for r, o in zip(references, owners, strict=True) if o == row), 0)
        both.append(2 * score * best / (score + best) if score + best else 0.0)
    return alone, both


def features(rows, seed, dtype=torch.float64):
    return torch.randn(rows, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_formulas(dtype):
    image, caption, references = features(37, 0, dtype), features(37, 1, dtype), features(90, 2, dtype)
    owners = [*range(37), *np.random.default_rng(0).integers(0, 37, 53).tolist()]
    alone, both = by_hand(*(x.double().numpy() for x in (image, caption, references)), owners)
    np.testing.assert_allclose(clip_score(image, caption), alone, rtol=0, atol=1e-12)
    np.testing.assert_allclose(ref_clip_score(image, caption, references, owners), both, rtol=0, atol=1e-12)
    assert 5 < sum(score == 0 for score in alone) < 32


def test_bounds():
    x = features(3, 4)
    assert clip_score(x, 7 * x) == pytest.approx([2.5] * 3)
    assert clip_score(x, -x).tolist() == [0] * 3
    assert ref_clip_score(x, x, x, [0, 1, 2]) == pytest.approx([2 * 2.5 / 3.5] * 3)
    assert ref_clip_score(x, x, -x, [0, 1, 2]).tolist() == [0] * 3
    assert ref_clip_score(x, -x, x, [0, 1, 2]).tolist() == [0] * 3


class HashedWords:
    """A scorer of no merit: mean pixel of each channel and word counts, with what it was asked."""

    def __init__(self):
        self.texts, self.batches = [], []

    def encode_image(self, images):
        self.batches.append(len(images))
        return images.mean((2, 3)) @ torch.ones(3, 8) + images[:, 0, 0, :1]

    def encode_text(self, texts):
        self.texts += texts
        counts = torch.zeros(len(texts), 8)
        for row, text in enumerate(texts):
            for word in text.split():
                counts[row, len(word) % 8] += 1
        return counts


def test_through_a_scorer():
    scorer = HashedWords()
    images = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    captions = ["a cat", "two dogs", "one red bus", "grass", "an open window"]
    references = [["the cat", "animal"], ["dogs"], ["bus", "a big bus", "red"], ["green"], ["window"]]
    scores = score_captions(scorer, iter(images), captions, references, batch=2)
    assert scorer.batches == [2, 2, 1]
    assert scorer.texts[:5] == [f"A photo depicts {text}" for text in captions]
    prefixed = [f"A photo depicts {text}" for text in captions]
    flat = [f"A photo depicts {text}" for texts in references for text in texts]
    owners = [0, 0, 1, 2, 2, 2, 3, 4]
    raw = [scorer.encode_image(images), scorer.encode_text(prefixed), scorer.encode_text(flat)]
    alone, both = by_hand(*(x.double().numpy() for x in raw), owners)
    np.testing.assert_allclose(scores.clip_score, alone, rtol=0, atol=1e-12)
    np.testing.assert_allclose(scores.ref_clip_score, both, rtol=0, atol=1e-12)
    assert score_captions(scorer, images, captions).ref_clip_score is None


def test_an_open_clip_model_is_a_scorer():
    open_clip = pytest.importorskip("open_clip.model")
    image_module = pytest.importorskip("PIL.Image")
    torch.manual_seed(0)
    vision = dict(image_size=32, patch_size=8, layers=1, width=32, head_width=16)
    model = open_clip.CLIP(16, vision, dict(context_length=12, vocab_size=300, width=16, heads=2, layers=1)).eval()
    pictures = [image_module.new("RGB", (32, 32), colour) for colour in ("red", "white", "black")]

    def pixels(picture):
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255

    def tokens(texts):
        rows = [list(text.encode())[-11:] for text in texts]
        return torch.tensor([[1, *row, *[0] * (11 - len(row))] for row in rows])

    captions, references = ["red", "white", "black"], [["red one"], ["white", "pale"], ["dark"]]
    scores = score_captions(model, pictures, captions, references, preprocess=pixels, tokenize=tokens)
    with torch.no_grad():
        image = model.encode_image(torch.stack(list(map(pixels, pictures))), normalize=True)
        text = model.encode_text(tokens([f"A photo depicts {caption}" for caption in captions]), normalize=True)
    expected = 2.5 * (image * text).sum(1).clamp(min=0)
    np.testing.assert_allclose(scores.clip_score, expected.numpy(), rtol=0, atol=1e-6)
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_errors():
    x = features(3, 0)
    with pytest.raises(ValueError, match=r"clip_score: caption must be as long as image, 3; got 2"):
        clip_score(x, x[:2])
    with pytest.raises(ValueError, match=r"clip_score: caption must have D = 24 features, as the others; got shape"):
        clip_score(x, x[:, :4])
    with pytest.raises(ValueError, match=r"image must be finite, and no row all zeros; got zeros in row 1"):
        clip_score(x * torch.tensor([[1], [0], [1]]), x)
    with pytest.raises(ValueError, match=r"caption must be finite, .* got NaN or infinity in row 2"):
        clip_score(x, x * torch.tensor([[1], [1], [torch.nan]]))
    with pytest.raises(
        ValueError, match=r"ref_clip_score: owners must name every image at least once; got none for image 1"
    ):
        ref_clip_score(x, x, x, [0, 2, 2])
    with pytest.raises(ValueError, match=r"owners must lie within \[0, 3\); got from 0 to 3"):
        ref_clip_score(x, x, x, [0, 1, 3])
    with pytest.raises(ValueError, match=r"score_captions: images must be as long as captions, 2; got 1"):
        score_captions(HashedWords(), torch.rand(1, 3, 4, 4), ["a", "b"])
