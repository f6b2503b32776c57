"""`limber-fast reproduce --miniature` on few drawings, three steps an encoder, two seeds: every row, figure and bar."""

import html
import json
import math
import re
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("open_clip")

from limber_fast import cli, demo, demo_limber, miniature
from limber_fast.data.emoji import EmojiDataset, concepts
from limber_fast.evaluation import emoji_transfer
from limber_fast.evaluation.clip_score import score_captions
from limber_fast.evaluation.emoji import TestSet
from limber_fast.evaluation.emoji_limber import PREFIX, SHOTS
from limber_fast.models.clip import SmallClip, SmallClipConfig
from limber_fast.models.tokenizer import WordTokenizer
from limber_fast.report import demo_limber as section
from limber_fast.report.demo import write_result
from limber_fast.training.config import TrainConfig
from limber_fast.training.drawings import Drawings
from limber_fast.training.other_encoders import LABELS, new_encoder

SEEDS = 2


@pytest.fixture(scope="module")
def small():
    """Every 25th concept that two vendors drew and the unseen one; every 16th of the held-out ones."""
    train, test = Drawings.of(EmojiDataset(("noto", "twemoji"))), Drawings.of(EmojiDataset("fluent-emoji-flat", "all"))
    seen = torch.unique(train.concept)[::25]
    unseen = [i for i in torch.unique(test.concept).tolist() if concepts()[i].split == "test"][::16]
    tested = torch.isin(test.concept, torch.cat([seen, torch.tensor(unseen)]))
    return TestSet(train[torch.isin(train.concept, seen)], test[tested])


def reproduce(folder, *options):
    budget = ("--steps", "3", "--minutes", "0.001", "--threads", "1")  # the minutes: of what follows the training
    return cli.main(["--quiet", "reproduce", "--miniature", "--output", str(folder), *budget, *options])


@pytest.fixture(scope="module")
def shrunk(small):
    """The command with few drawings, small batches, two seeds and four questions of a kind; the loss is not timed."""
    sizes = {"concepts_per_batch": 8, "locked_concepts": 8, "locked_views": 1}
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TestSet, "shipped", lambda: small)
        patch.setattr(demo, "TrainConfig", partial(TrainConfig, **sizes))
        patch.setattr(demo, "ASKED", 20)
        patch.setattr(demo, "sweep", lambda *arguments: iter(()))
        patch.setattr(miniature, "SEEDS", SEEDS)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(shrunk, tmp_path_factory):
    folder = tmp_path_factory.mktemp("miniature")
    assert reproduce(folder) == 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    return folder, page, json.loads((folder / "result.json").read_text(encoding="utf-8"))["limber"]


def intervals(row):
    yield from (row[name] for name in ("cider_d", "clip_score", "ref_clip_score", "name_seen", "name_unseen"))
    for by_shots in row["vqa"].values():
        yield from by_shots.values()


def cells(page):
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page, re.S)]


def test_every_row_and_column_is_there_and_finite(finished):
    folder, page, limber = finished
    assert tuple(limber["rows"]) == demo_limber.ORDER
    for name, row in limber["rows"].items():
        alone = name in (demo_limber.MAJORITY, demo_limber.TOLD)
        assert all(set(x) == {str(n) for n in (SHOTS[:1] if alone else SHOTS)} for x in row["vqa"].values())
        for found in intervals(row):
            assert all(map(math.isfinite, found.values())) and 0 <= found["low"] <= found["mean"] <= found["high"]
    table = cells(page)
    assert list(section.HEADER) in table and list(section.KINDS_HEADER) in table
    for name, row in limber["rows"].items():
        figures, kinds = (found for found in table if found[0] == name)
        assert len(figures) == len(section.HEADER) and len(kinds) == len(section.KINDS_HEADER)
        assert figures[2].startswith(f"{row['clip_score']['mean']:.1f} (")
    assert (folder / "table.md").read_text(encoding="utf-8").count("\n| label-supervised, tuned |") == 2
    assert html.escape(section.FULL_NOTE) in page and section.LACKS not in page


def test_verdicts_of_the_bars_are_on_the_page(finished):
    _, page, limber = finished
    table = cells(page)
    assert len(limber["bars"]) == 8
    kept = sum(held for *_, held in limber["bars"])
    assert f"{kept} of 8 expectations hold. Not held: " in page or (kept == 8 and "All 8 expectations hold." in page)
    for what, figures, held in limber["bars"]:
        assert [what, figures, "yes" if held else "no"] in table
    for sentence in limber["missed_orders"] or ["CIDEr-D falls in the paper's order"]:
        assert html.escape(sentence) in page


def test_both_figures_are_drawn_of_every_seed(finished):
    _, page, limber = finished
    assert page.count("data:image/svg+xml;base64,") == 4
    assert "Zero-shot CLIP minus a linear probe" in page and "Accuracy on the unseen vendor" in page
    assert len(limber["against_probe"]) == len(limber["robustness"]) == SEEDS
    for groups, shifts in zip(limber["against_probe"], limber["robustness"], strict=True):
        assert len(groups) > 5 and all(group["names"] > 1 and group["images"] > 0 for group in groups)
        assert [shift["model"] for shift in shifts] == ["zero-shot CLIP", "supervised classifier"]
        shares = [x[name] for x in groups for name in ("zero_shot", "probe")]
        shares += [x[name] for x in shifts for name in ("known_vendors", "unseen_vendor")]
        assert all(0 <= share <= 100 for share in shares)


def test_means_are_over_seeds_and_captions_scored_by_the_other_seeds_clip(finished, small):
    folder, _, limber = finished
    assert len(limber["seeds"]) == SEEDS
    for of_seeds in zip(*(intervals(seed["CLIP"]) for seed in (limber["rows"], *limber["seeds"])), strict=True):
        merged, *alone = (found["mean"] for found in of_seeds)
        assert merged == pytest.approx(np.mean(alone))
        assert (of_seeds[0]["low"], of_seeds[0]["high"]) == (min(alone), max(alone))
    references = [list(concepts()[i].names) for i in small.test.concept.tolist()]
    for seed, place in enumerate((folder, folder / "seed-1")):
        model, tokenizer = demo.load_model((folder / "seed-1" if seed == 0 else folder) / "checkpoint.pt")
        said = json.loads((place / "limber" / "CLIP.json").read_text(encoding="utf-8"))["captions"]
        again = score_captions(model, small.test.images, said, references, prefix=PREFIX, tokenize=tokenizer,
                               preprocess=lambda image: image.float() / 255)  # fmt: skip
        found = limber["seeds"][seed]["CLIP"]
        assert found["clip_score"]["mean"] == pytest.approx(100 * again.clip_score.mean(), abs=1e-3)
        assert found["ref_clip_score"]["mean"] == pytest.approx(100 * again.ref_clip_score.mean(), abs=1e-3)


def test_a_resumed_run_trains_and_asks_nothing_again(finished, monkeypatch):
    folder, _, limber = finished
    for owner, name in ((miniature.other_encoders, "train_encoder"), (demo_limber, "fit_projection")):
        monkeypatch.setattr(owner, name, None)
    assert reproduce(folder, "--resume") == 0
    again = json.loads((folder / "result.json").read_text(encoding="utf-8"))["limber"]
    assert all(again[name] == limber[name] for name in ("rows", "bars", "against_probe", "robustness"))


def test_a_score_that_is_not_finite_is_one_line_and_no_page(shrunk, tmp_path, monkeypatch, capsys):
    def train(kind, *arguments, **options):
        tower = new_encoder(kind).eval().requires_grad_(False)
        tower.head.bias.data[0] = math.nan
        return tower

    monkeypatch.setattr(miniature.other_encoders, "train_encoder", train)
    assert reproduce(tmp_path) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "NaN" in error
    assert not (tmp_path / "result.json").exists() and not (tmp_path / "report.html").exists()


@pytest.fixture
def towers(small):
    """(CLIP with its tokenizer, supervised tower), untrained."""
    torch.manual_seed(0)
    tokenizer = WordTokenizer.from_captions(concept.name for concept in concepts())
    return SmallClip(SmallClipConfig(vocab_size=tokenizer.vocab_size)).eval(), tokenizer, new_encoder(LABELS).eval()


def test_ties_score_nothing(towers, small, monkeypatch):
    clip, tokenizer, supervised = towers
    supervised.head.weight.data.zero_()
    supervised.head.bias.data.zero_()
    monkeypatch.setattr(emoji_transfer, "similarities", lambda x, classes: 0 * (x @ classes))
    for shift in emoji_transfer.robustness(clip, tokenizer, supervised, small):
        assert (shift.known_vendors, shift.unseen_vendor) == (0, 0)
    assert {group.zero_shot for group in emoji_transfer.against_probe(clip, tokenizer, supervised, small)} == {0}


@pytest.mark.parametrize("of_clip", [True, False])
@pytest.mark.parametrize("figure", [emoji_transfer.robustness, emoji_transfer.against_probe])
def test_scores_that_are_not_finite_are_refused(towers, small, of_clip, figure):
    clip, tokenizer, supervised = towers
    tower = clip.visual if of_clip else supervised
    for parameter in tower.parameters():
        parameter.data.fill_(math.nan)
    with pytest.raises(ValueError, match=r"NaN|nan") as caught:
        figure(clip, tokenizer, supervised, small)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_result_json_refuses_figures_that_are_not_finite(tmp_path, bad):
    found = demo.Evaluation({"seen": {"top1": 1.0}})
    limber = {"rows": {"blind": {"clip_score": None, "cider_d": {"mean": bad}}}}
    with pytest.raises(ValueError, match=rf"limber\.rows\.blind\.cider_d\.mean must be finite; got {bad}"):
        write_result(tmp_path / "result.json", {}, found, limber, [])
    assert not (tmp_path / "result.json").exists()
    limber["rows"]["blind"]["cider_d"]["mean"] = 2.0
    write_result(tmp_path / "result.json", {}, found, limber, [])
    assert json.loads((tmp_path / "result.json").read_text())["limber"] == limber
