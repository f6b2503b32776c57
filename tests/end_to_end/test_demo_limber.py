"""The demo's LiMBeR on its real data: the language model that ships, questions and answers, P fitted on naming."""

import random

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from limber_fast.data.emoji import EmojiDataset, concepts
from limber_fast.data.emoji_questions import QUESTIONS, answer_of, main_colour
from limber_fast.evaluation.emoji_limber import BATCH, SHOTS, Benchmark, shuffled
from limber_fast.models.limber import Limber
from limber_fast.models.small_language_model import small_language_model
from limber_fast.training.drawings import Drawings
from limber_fast.training.projection import SOFT_PROMPTS, Standardise, fit_projection, spread


@pytest.fixture(scope="module")
def language_model():
    return small_language_model()


def test_language_model_is_int8_and_names_what_it_is_told(language_model):
    model, tokenizer = language_model
    assert 2e6 < sum(x.numel() for x in model.buffers()) < 5e6
    known = random.Random(0).sample(concepts(), 100)
    tokens = [tokenizer(" " + c.name).input_ids + tokenizer("A picture of").input_ids for c in known]
    said = [text.strip() for text in model.generate(tokens, max_new_tokens=16, tokenizer=tokenizer).texts]
    assert np.mean([text == c.name for text, c in zip(said, known, strict=True)]) > 0.2


def test_answers():
    by_name = {concept.name: concept for concept in concepts()}
    assert answer_of("group", by_name["fox"]) == "animals nature"
    assert answer_of("subgroup", by_name["fox"]) == "animal mammal"
    assert answer_of("gender", by_name["fox"]) is None
    assert answer_of("gender", by_name["woman"]) == "woman"
    assert (answer_of("tone", by_name["fox"]), answer_of("tone", by_name["waving hand"])) == ("no", "yes")


@pytest.mark.parametrize(
    ("rgb", "name"),
    [((230, 20, 20), "red"), ((30, 60, 220), "blue"), ((20, 160, 40), "green"), ((250, 210, 30), "yellow"),
     ((10, 10, 10), "black"), ((128, 128, 128), "grey"), ((120, 70, 30), "brown"), ((250, 150, 190), "pink"),
     ((255, 255, 255), None)],
)  # fmt: skip
def test_colour_of_pixels(rgb, name):
    image = np.full((32, 32, 3), 255, np.uint8)
    image[8:24, 8:24] = rgb
    assert main_colour(image) == name


def test_spread_is_a_map_of_its_own_for_every_soft_prompt():
    features, weight = torch.randn(3, 5), torch.randn(7, SOFT_PROMPTS * 5)
    expected = torch.stack([features @ part.T for part in weight.split(5, dim=1)], 1)
    torch.testing.assert_close(spread(features) @ weight.T, expected)


def test_benchmark_asks_test_drawings_and_shows_training_ones():
    train, test = Drawings.of(EmojiDataset("noto")), Drawings.of(EmojiDataset("fluent-emoji-flat", "all"))
    benchmark = Benchmark(train, test, asked=40)
    assert [asked.kind for asked in benchmark.asked] == list(QUESTIONS)
    known = concepts()
    for asked in benchmark.asked:
        assert len(asked.rows) == len(set(asked.rows)) == len(asked.answers) == 40
        assert len(asked.shots) == max(SHOTS)
        image = test.images[asked.rows[0]].permute(1, 2, 0).numpy()
        assert answer_of(asked.kind, known[int(test.concept[asked.rows[0]])], image) == asked.answers[0]
    assert 200 < benchmark.ceiling < 1000


def test_a_map_fitted_on_naming_names_and_blind_does_not(language_model):
    """Features that tell concepts apart perfectly: what is fitted must name them, and shuffled ones must not."""
    model, tokenizer = language_model
    drawings = Drawings.of(EmojiDataset("noto"))[torch.arange(0, 1200, 30)]
    features = torch.randn(len(drawings), 64, generator=torch.Generator().manual_seed(0))
    features = Standardise.of(features)(features)
    limber = Limber(None, model, tokenizer, width=SOFT_PROMPTS * 64)
    ticks = iter(range(100_000))  # a clock of steps: the schedule is the same on every machine
    steps = fit_projection(limber, features, drawings, 400, batch=20, clock=lambda: next(ticks))
    assert 50 < steps < 400
    benchmark = Benchmark(drawings, drawings, asked=4)
    names = [c.name for c in benchmark.drawn]

    def right(features):
        said = limber.caption(spread(features), max_new_tokens=16, batch_size=BATCH)
        return np.mean([text == name for text, name in zip(said, names, strict=True)])

    assert right(features) > 0.5
    assert right(shuffled(features)) < 0.2
    assert not any(p.requires_grad for p in model.parameters())
