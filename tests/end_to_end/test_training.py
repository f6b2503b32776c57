"""Training parts: what a batch holds, what augmentation leaves alone, what a checkpoint survives."""

import random

import pytest
import torch

pytest.importorskip("open_clip")

from open_clip.model import CLIP

from limber_fast.data.emoji import EmojiDataset, concepts
from limber_fast.demo import build_trainer
from limber_fast.models.clip import SmallClip, SmallClipConfig
from limber_fast.models.tokenizer import UNKNOWN, WordTokenizer, split_words
from limber_fast.training.augment import Augment
from limber_fast.training.captions import CaptionSampler
from limber_fast.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from limber_fast.training.config import AugmentConfig, CaptionConfig, TrainConfig
from limber_fast.training.drawings import Drawings
from limber_fast.training.muon import orthogonalise
from limber_fast.training.schedule import TimeBudget, warmup_cosine

STILL = AugmentConfig(1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0)


@pytest.fixture(scope="module")
def drawings():
    """A fifth of the drawings, every style of the concepts among them."""
    everything = Drawings.of(EmojiDataset(fold="train"))
    return everything[torch.nonzero(everything.concept % 5 == 0)[:, 0]]


@pytest.fixture
def trainer(drawings):
    return build_trainer(TrainConfig(minutes=1, concepts_per_batch=8), drawings)


def test_batch_holds_each_concept_in_different_styles(trainer, drawings):
    batches = trainer.batches
    batch = batches(3)
    first, second = batch.ids.chunk(2)
    assert torch.equal(first, second)
    assert len(first.unique()) == 8
    assert batch.images.shape == (16, 3, 32, 32)
    again = batches(3)
    assert torch.equal(batch.images, again.images)
    assert torch.equal(batch.tokens, again.tokens)
    rng = random.Random(0)
    for concept in first.tolist():
        rows = batches._styles(concept, rng)
        drawn = int((drawings.concept == concept).sum())
        assert len(set(rows)) == min(2, drawn)
        assert (drawings.concept[rows] == concept).all()


def test_an_epoch_draws_each_concept_once(trainer):
    drawn = torch.cat([trainer.batches(step).ids[:8] for step in range(len(trainer.batches))])
    assert len(drawn.unique()) == len(drawn)


def test_augmentation_off_is_the_image(drawings):
    images = drawings.images[:16]
    out = Augment(STILL)(images, torch.Generator().manual_seed(0))
    assert torch.allclose(out, images.float() / 255, atol=1e-4)


def test_augmentation_keeps_the_ground_white_and_the_range(drawings):
    images = drawings.images[:64].clone()
    images[:8] = 255
    out = Augment(AugmentConfig())(images, torch.Generator().manual_seed(0))
    assert (out[:8] == 1).all()
    assert 0 <= out.min() < out.max() <= 1
    assert (out[8:] - images[8:].float() / 255).abs().mean() > 0.02


def test_captions_use_known_words_only(trainer):
    known = concepts()
    sampler, rng = CaptionSampler(CaptionConfig()), random.Random(0)
    for concept in trainer.batches.drawn[::10]:
        assert UNKNOWN not in trainer.tokenizer.encode(sampler(known[concept], rng))


def test_translated_captions_are_of_one_language(trainer):
    sampler, rng = CaptionSampler(CaptionConfig(translated=1, with_subgroup=0, word_dropout=0)), random.Random(0)
    for index in trainer.batches.drawn[::10]:
        concept = concepts()[index]
        words = set(split_words(sampler(concept, rng)))
        assert any(words <= set(split_words(" ".join(texts))) for texts in concept.translations.values())


def locked(trainer):
    """The trainer, just past the fraction of its budget at which the image tower is locked."""
    trainer.budget.start()
    for _ in range(2):
        trainer.train_step()
    trainer.budget = TimeBudget(60.0, 60 * trainer.config.lock_images + 1, clock=lambda: 0.0)
    trainer.train_step()
    return trainer


def test_locked_image_tower_stays_while_texts_learn(trainer, drawings):
    locked(trainer)
    images, texts = (
        lambda: {n: p.clone() for n, p in trainer.model.state_dict().items() if n.startswith("visual")},
        lambda: trainer.model.token_embedding.weight.clone(),
    )
    before, words, seen = images(), texts(), trainer.images
    for _ in range(2):
        values = trainer.train_step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in images().items())
    assert not torch.equal(texts(), words) and values["loss"] == values["loss"] and trainer.images == seen
    features = trainer.locked.features
    assert features.shape == (trainer.config.locked_views, len(drawings), 128)
    batch = trainer.locked(trainer.step)
    drawn = trainer.locked.batches.draw(trainer.step)
    assert torch.equal(drawings.concept[drawn.rows], batch.ids)
    where = (features[:, drawn.rows] == batch.images).all(-1)
    assert where.any(0).all() and where.any(1).all()
    # The tower whose features these are is the one that is tested.
    with torch.no_grad():
        plain = trainer.averaged_model().encode_image(drawings.images[:256].float() / 255)
    assert torch.nn.functional.cosine_similarity(plain, features[0, :256]).mean() > 0.6


def test_a_larger_budget_unlocks_the_images(trainer):
    locked(trainer)
    trainer.budget = TimeBudget(60.0, 30.0, clock=lambda: 0.0)
    before = trainer.model.visual.head.weight.clone()
    trainer.train_step()
    assert trainer.locked is None and not torch.equal(before, trainer.model.visual.head.weight)


def test_tokenizer():
    tokenizer = WordTokenizer.from_captions(["Red apple", "a drawing of São Tomé"], context_length=4)
    ids = tokenizer(["red apples", "sao zebra", "a drawing of apple red", ""])
    assert ids.shape == (4, 4)
    assert ids[0].tolist() == [tokenizer._ids["red"], tokenizer._ids["apple"], tokenizer.eos, 0]
    assert ids[1, 1] == UNKNOWN
    assert ids[2, 3] == tokenizer.eos
    assert ids[3, 0] == tokenizer.eos == tokenizer.vocab_size - 1
    with pytest.raises(ValueError, match="repeat"):
        WordTokenizer(["a", "a"])


def test_text_tower_is_open_clips():
    model = SmallClip(SmallClipConfig(vocab_size=50, text_layers=2)).eval()
    tokens = torch.tensor([[3, 4, 49, 0, 0, 0, 0, 0, 0, 0, 0, 0], [5, 6, 7, 8, 49, 0, 0, 0, 0, 0, 0, 0]])
    assert torch.allclose(model.encode_text(tokens), CLIP.encode_text(model, tokens), atol=1e-5)


def test_text_tower_without_layers_is_a_bag_of_words():
    model = SmallClip(SmallClipConfig(vocab_size=50)).eval()
    eos = 49
    tokens = torch.tensor([[3, 4, eos, 0], [4, 3, eos, 0], [3, 5, eos, 0], [eos, 0, 0, 0]])
    found = model.encode_text(tokens)
    words = model.token_embedding.weight[[3, 4, eos]].sum(0) / 3**0.5
    torch.testing.assert_close(found[0], model.ln_final(words) @ model.text_projection)
    torch.testing.assert_close(found[0], found[1])
    assert not torch.allclose(found[0], found[2]) and found[3].isfinite().all()
    torch.testing.assert_close(found[0], model.encode_text(tokens[:1, :3])[0])


def test_average_leaves_the_attention_mask(trainer):
    trainer.budget.start()
    for _ in range(2):
        values = trainer.train_step()
    assert all(value == value for value in values.values())
    model = trainer.averaged_model()
    assert torch.equal(model.attn_mask, trainer.model.attn_mask)
    assert not any(module.training for module in model.modules())
    assert all(torch.isfinite(tensor).all() for tensor in trainer.average.tensors.values())


def test_checkpoint_resumes_where_it_stopped(trainer, drawings, tmp_path):
    trainer.budget.start()
    trainer.train_step()
    trainer.budget.pause()
    trainer.save(tmp_path)
    other = build_trainer(trainer.config, drawings)
    other.restore(load_checkpoint(tmp_path / "checkpoint.pt"))
    assert (other.step, other.budget.spent) == (trainer.step, trainer.budget.spent)
    losses = [t.losses(t.batches(t.step))[0].item() for t in (trainer, other)]
    assert losses[0] == losses[1]


def test_checkpoint_of_a_locked_tower_resumes_where_it_stopped(trainer, drawings, tmp_path):
    locked(trainer).save(tmp_path)
    other = build_trainer(trainer.config, drawings)
    other.restore(load_checkpoint(tmp_path / "checkpoint.pt"))
    other.budget = trainer.budget
    assert torch.equal(other.locked.features, trainer.locked.features)
    assert trainer.train_step() == other.train_step()
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), other.model.parameters(), strict=True))
    assert all(torch.equal(trainer.average.tensors[n], tensor) for n, tensor in other.average.tensors.items())


def test_damaged_checkpoints_are_refused(trainer, tmp_path):
    trainer.save(tmp_path)
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_checkpoint(path)
    torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="expected format"):
        load_checkpoint(path)
    with pytest.raises(ValueError, match="keys"):
        save_checkpoint(path, {"step": 1})


@pytest.mark.parametrize("shape", [(48, 432), (128, 128), (512, 128), (3, 128, 128)])
def test_orthogonalise_evens_out_singular_values(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    spread = u * torch.logspace(0, -2, s.shape[-1], dtype=torch.float64) @ vh
    found = orthogonalise(spread.float()).double()
    values = torch.linalg.svdvals(found)
    assert 0.6 < values.min() < values.max() < 1.3
    # The singular vectors stay: in their basis the result is diagonal.
    inner = u.mT @ found @ vh.mT
    assert (inner - torch.diag_embed(torch.diagonal(inner, dim1=-2, dim2=-1))).abs().max() < 1e-2


def test_schedule_and_budget():
    assert warmup_cosine(0.04, 0.08) == pytest.approx(0.5)
    assert warmup_cosine(0.08, 0.08) == pytest.approx(1)
    assert warmup_cosine(1, 0.08) == pytest.approx(0)
    now = [0.0]
    budget = TimeBudget(10, spent=2, clock=lambda: now[0])
    now[0] = 5
    assert budget.spent == 2
    budget.start()
    now[0] = 8
    assert budget.fraction == 0.5
    budget.pause()
    now[0] = 100
    assert budget.spent == 5


@pytest.mark.parametrize(
    ("field", "value"), [("minutes", 0), ("minutes", float("nan")), ("warmup", 1), ("learning_rate", -1),
                         ("learning_rate", float("inf")), ("seed", 2**64), ("seed", -1)]
)
def test_settings_are_checked(field, value):
    with pytest.raises(ValueError, match=f"TrainConfig: {field}"):
        TrainConfig(**{field: value})


def test_settings_survive_a_checkpoint():
    config = TrainConfig(minutes=2, augment=AugmentConfig(hue=0.5))
    assert TrainConfig.from_dict(config.to_dict()) == config
