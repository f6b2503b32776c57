"""The demo's LiMBeR on its real data: the language model that ships, questions and answers, P fitted on naming."""

import math
import random
import time

import numpy as np
import pytest
import torch

pytest.importorskip("open_clip")
pytest.importorskip("transformers")

from limber_fast import demo, demo_limber, miniature
from limber_fast.console import Console
from limber_fast.data.emoji import EmojiDataset, concepts
from limber_fast.data.emoji_questions import QUESTIONS, answer_of, main_colour
from limber_fast.evaluation.emoji_limber import BATCH, SHOTS, Benchmark, shuffled
from limber_fast.models.clip import SmallResNet
from limber_fast.models.limber import Limber
from limber_fast.models.small_language_model import small_language_model
from limber_fast.report import demo_limber as limber_report
from limber_fast.training import other_encoders
from limber_fast.training.config import TrainConfig
from limber_fast.training.drawings import Drawings
from limber_fast.training.projection import SOFT_PROMPTS, Standardise, fit_projection, least_squares, spread


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


def test_the_map_starts_at_the_least_squares_of_its_names_embeddings(language_model):
    model, tokenizer = language_model
    drawings = Drawings.of(EmojiDataset("noto"))[torch.arange(0, 900, 3)]
    features = torch.randn(300, 24, generator=torch.Generator().manual_seed(0))
    limber = Limber(None, model, tokenizer, width=SOFT_PROMPTS * 24)
    least_squares(limber, features, drawings, penalty=0.1)
    known, embeddings = concepts(), model.wte.double()
    wanted = []
    for i in drawings.concept.tolist():
        tokens = tokenizer(" " + known[i].name).input_ids
        wanted.append(torch.stack([embeddings[(tokens * SOFT_PROMPTS)[j]] for j in range(SOFT_PROMPTS)]))
    wanted = torch.stack(wanted)
    maps = limber.projection.weight.detach().double().unflatten(1, (SOFT_PROMPTS, 24))

    def slope(maps):
        """Of the penalised squares, which the map has to have none of."""
        maps = maps.clone().requires_grad_()
        found = torch.einsum("nd,ekd->nke", features.double(), maps) + limber.projection.bias.double()
        squares = (found - wanted).square().sum() + 0.1 * 300 * maps.square().sum()
        return torch.autograd.grad(squares, maps)[0].norm()

    assert slope(maps) < 1e-4 * slope(torch.zeros_like(maps))


@pytest.mark.parametrize("kind", [other_encoders.LABELS, other_encoders.PIXELS])
def test_other_encoders_learn_and_are_not_trained_twice(kind, tmp_path, monkeypatch):
    drawings, console = Drawings.of(EmojiDataset("noto"))[torch.arange(0, 1200, 50)], Console(quiet=True)
    ticks, losses = iter(range(1000)), []  # a clock of steps
    other_encoders.train_encoder(
        kind, drawings, TrainConfig(minutes=0.5, concepts_per_batch=8), clock=lambda: next(ticks),
        watch=lambda fraction, loss: losses.append(loss),
    )  # fmt: skip
    assert 10 < len(losses) <= 30
    assert losses[-1] < losses[0]

    config = TrainConfig(minutes=0.002, concepts_per_batch=8)
    once = miniature.encoder(kind, drawings, config, tmp_path, console)
    monkeypatch.setattr(other_encoders, "train_encoder", None)
    again = miniature.encoder(kind, drawings, config, tmp_path, console)
    assert all(torch.equal(a, b) for a, b in zip(once.state_dict().values(), again.state_dict().values(), strict=True))
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    with pytest.raises(TypeError, match="NoneType"):  # of other settings nothing is taken
        miniature.encoder(kind, drawings, TrainConfig(minutes=0.003, concepts_per_batch=8), tmp_path, console)


def test_rows_are_scored_ordered_and_not_asked_again(tmp_path, monkeypatch):
    """Every row of the table on a few drawings; a second run takes all that was said from its folder."""
    some = torch.arange(0, 1200, 50)
    train, test = Drawings.of(EmojiDataset("noto"))[some], Drawings.of(EmojiDataset("fluent-emoji-flat", "all"))[some]
    benchmark = Benchmark(train, test, asked=4)
    benchmark.asked = benchmark.asked[:1]
    torch.manual_seed(0)
    towers = {name: SmallResNet(8, 32, 8).eval() for name in (demo_limber.CLIP, demo_limber.LABELS, demo_limber.PIXELS)}
    towers[demo_limber.TUNED] = towers[demo_limber.LABELS]
    before = [p.clone() for p in towers[demo_limber.LABELS].parameters()]
    fit, console = demo_limber.Fit(seconds=4, seed=0, asked=4), Console(quiet=True)
    ticks = iter(range(1000))
    said = demo_limber.Said(tmp_path, fit)
    found = demo_limber.run(towers, benchmark, fit, said, console, clock=lambda: next(ticks))
    assert tuple(found.rows) == demo_limber.ORDER
    assert set(found.steps) == {*towers, demo_limber.RANDOM}
    assert all(torch.equal(a, b) for a, b in zip(before, towers[demo_limber.LABELS].parameters(), strict=True))

    monkeypatch.setattr(demo_limber, "fit_projection", None)
    monkeypatch.setattr(Limber, "caption", None)
    again = demo_limber.run(towers, benchmark, fit, demo_limber.Said(tmp_path, fit), console)
    assert again.summaries == found.summaries
    with pytest.raises(TypeError, match="NoneType"):  # of other settings nothing is taken
        other = demo_limber.Fit(seconds=5, seed=0, asked=4)
        demo_limber.run(towers, benchmark, other, demo_limber.Said(tmp_path, other), console)


def test_rows_that_would_come_too_late_are_left_out_and_added_by_a_second_run(tmp_path):
    some = torch.arange(0, 1200, 50)
    train, test = Drawings.of(EmojiDataset("noto"))[some], Drawings.of(EmojiDataset("fluent-emoji-flat", "all"))[some]
    benchmark = Benchmark(train, test, asked=4)
    torch.manual_seed(0)
    towers, fit = {demo_limber.CLIP: SmallResNet(8, 32, 8).eval()}, demo_limber.Fit(seconds=4, seed=0, asked=4)

    def run(until):
        ticks = iter(range(1000))
        said = demo_limber.Said(tmp_path, fit)
        return demo_limber.run(towers, benchmark, fit, said, Console(quiet=True), clock=lambda: next(ticks),
                               until=until)  # fmt: skip

    lacking = run(time.monotonic())
    assert lacking.left_out == [demo_limber.RANDOM, demo_limber.TOLD]
    assert list(lacking.rows) == [demo_limber.CLIP, demo_limber.BLIND, demo_limber.SHUFFLED, demo_limber.MAJORITY]
    found = miniature.Miniature([lacking])
    assert found.facts()["left_out"] == lacking.left_out and len(found.facts()["bars"]) == 3
    assert "time was short: random, told in words. The same command" in limber_report.section(found, benchmark)
    assert "No other encoder's CIDEr-D" in limber_report.order(found)
    whole = run(time.monotonic() + 1000)
    assert not whole.left_out and {*whole.rows} == {*lacking.rows, demo_limber.RANDOM, demo_limber.TOLD}
    assert all(whole.summaries[name] == x for name, x in lacking.summaries.items())
    assert "time was short" not in limber_report.section(miniature.Miniature([whole]), benchmark)


def test_the_loss_is_timed_for_what_is_left(monkeypatch):
    budgets = []
    monkeypatch.setattr(demo, "sweep", lambda threads, budget, backend: budgets.append(budget) or [])
    for left in (math.inf, 20, -5):
        demo._time_loss(TrainConfig(minutes=5), time.monotonic() + left, Console(quiet=True))
    assert budgets == [60, pytest.approx(20, abs=1), 1]


@pytest.mark.parametrize("minutes, steps, full, whole", [(5, 0, False, 480), (20, 0, False, 1900), (1, 0, False, 240),
                                                         (5, 9, False, math.inf), (5, 0, True, math.inf)])  # fmt: skip
def test_the_whole_demo_has_an_end(minutes, steps, full, whole):
    after = demo.rest(TrainConfig(minutes=minutes, steps=steps), full)
    assert 60 * minutes + after + demo.PAGE <= whole and after > 150


def test_an_order_that_did_not_appear_is_named():
    def row(cider, *group, named=0.0):
        by_shots = {str(n): {"mean": share} for n, share in zip(SHOTS, group or (20.0,), strict=False)}
        return {"cider_d": {"mean": cider}, "vqa": {"group": by_shots}, "name_seen": {"mean": named}}

    summaries = {"CLIP": row(30, 50, named=16), "label-supervised": row(35, 34), "self-supervised": row(10),
                 "random": row(4), "blind": row(0, 20, 25, 26, 20), "shuffled": row(0, 20, 25, 24, 25),
                 "most frequent answer": row(0)}  # fmt: skip
    assert demo_limber.missed_orders(summaries) == ["CLIP is not above label-supervised in CIDEr-D: 30.0 against 35.0."]
    found = demo_limber.bars(summaries)
    assert [figures for what, figures, _ in found if "blind" in what] == ["20.0 / 25.0 / 26.0 / 20.0, 20.0"]
    assert {what: ok for what, _, ok in found} == {
        "group questions, 0 shots: CLIP at least random + 15": True,
        "group questions, 0 shots: label-supervised at least random + 15": False,
        "group questions, 0 / 1 / 2 / 4 shots: blind at most the most frequent answer + 5": False,
        "group questions, 0 / 1 / 2 / 4 shots: shuffled at most the most frequent answer + 5": True,
        "CIDEr-D: CLIP above label-supervised": False,
        "CIDEr-D: CLIP above self-supervised": True,
        "CIDEr-D: CLIP above random": True,
        "names of seen concepts, exact match: at least 15": True,
    }
