"""`limber-fast demo` on its real data with a small budget: it must learn, report, stop at Ctrl-C and go on."""

import csv
import json
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise

import pytest

pytest.importorskip("open_clip")

from limber_fast.demo import load_model
from limber_fast.evaluation.emoji import TestSet
from limber_fast.evaluation.ranking import top_k
from limber_fast.evaluation.zero_shot import class_features, image_features, name_prompts, similarities
from limber_fast.training.checkpoint import load_checkpoint

STEPS = 110  # after the interruption: far from the demo's 2,000; of 60, names are right by 2% in five, of 100 by 15%


def command(output, steps, *options):
    budget = ["--steps", str(steps), "--minutes", "0.25"]  # the minutes are those of what follows the training
    return [sys.executable, "-m", "limber_fast", "demo", "--output", str(output), *budget, *options]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A demo stopped by Ctrl-C in its first steps: its folder, exit code, what it said last, and its checkpoint."""
    folder = tmp_path_factory.mktemp("demo")
    process = subprocess.Popen(command(folder, 100_000), stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert "drawings" in line
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=120)[0]
    return folder, process.returncode, rest, load_checkpoint(folder / "checkpoint.pt")


@pytest.fixture(scope="module")
def finished(interrupted):
    """The same demo gone on with, in a pipe."""
    folder, steps = interrupted[0], interrupted[3]["step"] + STEPS
    done = subprocess.run(command(folder, steps, "--resume"), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return folder, done, json.loads((folder / "result.json").read_text(encoding="utf-8"))


def test_it_learns(finished):
    _, _, result = finished
    tables = result["zero_shot"]
    assert (tables["seen"]["classes"], tables["unseen_name"]["classes"]) == (1595, 160)
    # So few steps are far from the demo's figures, and far from chance.
    assert tables["seen"]["top5"] > 8 * tables["seen"]["chance"]["top5"]
    assert tables["unseen_name_and_tags"]["top5"] > 1.5 * tables["unseen_name_and_tags"]["chance"]["top5"]
    assert result["linear_probe_group"]["seen"] > result["linear_probe_group"]["seen_majority"] + 5
    assert 20 < tables["seen"]["pixel"]["top1"] < 45


def test_loss_falls_and_the_curve_is_written(finished):
    folder, _, result = finished
    with open(folder / "train.csv", encoding="utf-8") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    whole = [row for row in rows if "image_image_loss" in row]  # then other batches, in other languages
    assert whole[-1]["image_text_loss"] < whole[0]["image_text_loss"] - 0.5
    assert rows[-1]["step"] == result["training"]["steps"]
    assert all(a["step"] < b["step"] for a, b in pairwise(rows))
    # The last tenth of the steps is the text tower's.
    training = result["training"]
    assert 0 < len(whole) < len(rows) and "image_image_loss" not in rows[-1]
    assert 0 < training["images"] < training["steps"] * training["batch"]
    assert training["image_seconds"] < 0.95 * training["seconds"]


def test_page_is_whole_and_self_contained(finished):
    folder, _, result = finished
    page = (folder / "report.html").read_text(encoding="utf-8")
    for identifier in ("training", "zero-shot", "examples", "confusion", "limber", "loss", "machine"):
        assert f'<section id="{identifier}">' in page
    assert page.count('<div class="card">') == 48
    assert not re.search(r'(src|href)="(?!data:)|<script|@import|url\(', page)
    assert f"{result['zero_shot']['seen']['top1']:.1f}" in page
    assert page.count("data:image/svg+xml;base64,") == 3
    # Every size appears, measured or with the reason why not.
    assert len(result["loss_timing"]) == 24
    assert all((point["seconds"] is None) == bool(point["skipped"]) for point in result["loss_timing"])
    assert result["loss_timing"][0]["seconds"] > 0 and result["loss_timing"][0]["peak_mib"] > 0


def test_language_model_says_something_of_the_drawings(finished):
    folder, _, result = finished
    limber = result["limber"]
    rows = limber["rows"]
    assert list(rows) == ["CLIP", "random", "blind", "shuffled", "most frequent answer", "told in words"]
    assert (folder / "table.md").read_text(encoding="utf-8").count("\n| CLIP |") == 2
    assert all(steps > 0 for steps in limber["steps"].values())
    for row in rows.values():
        for interval in (row["cider_d"], row["name_seen"], *(x for kind in row["vqa"].values() for x in kind.values())):
            assert 0 <= interval["low"] <= interval["mean"] <= interval["high"] <= 1000
    assert set(rows["CLIP"]["vqa"]["group"]) == {"0", "1", "2", "4"}
    # What the language model makes of names it is told: far above what it says blind.
    assert rows["told in words"]["cider_d"]["mean"] > rows["blind"]["cider_d"]["mean"] + 50
    told, most = (rows[name]["vqa"]["group"]["0"]["mean"] for name in ("told in words", "most frequent answer"))
    assert told > most
    assert rows["told in words"]["cider_d"]["mean"] < limber["ceiling"] + 1


def test_pipe_gets_plain_text(finished):
    _, done, _ = finished
    assert "\x1b" not in done.stdout + done.stderr
    assert "\r" not in done.stdout
    assert re.search(r"training .*loss .*scale .*accuracy", done.stdout)


def test_checkpoint_is_the_tested_model(finished):
    folder, _, result = finished
    model, tokenizer = load_model(folder / "checkpoint.pt")
    asked = TestSet.shipped()
    names = [name_prompts(concept) for concept in asked.classes]
    again = similarities(image_features(model, asked.test.images), class_features(model, tokenizer, names))
    top5 = top_k(again[asked.seen], asked.labels[asked.seen])["top5"]
    assert top5 == pytest.approx(result["zero_shot"]["seen"]["top5"], abs=0.2)


def test_ctrl_c_leaves_a_checkpoint_that_resumes(interrupted, finished):
    _, code, rest, state = interrupted
    folder, done, result = finished
    assert code == 130
    assert "--resume" in rest
    assert not list(folder.glob(".*tmp"))
    assert f"resumed at step {state['step']}" in done.stdout
    assert 0 < state["step"] == result["training"]["steps"] - STEPS
    resumed = load_checkpoint(folder / "checkpoint.pt")
    assert resumed["history"][: len(state["history"])] == state["history"]


def test_foreign_checkpoint_is_one_line(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04 not a checkpoint")
    done = subprocess.run(command(tmp_path, STEPS, "--resume"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "not a readable checkpoint" in done.stderr
    assert "Traceback" not in done.stderr
