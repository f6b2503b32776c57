"""`limber-fast evaluate zero-shot | linear-probe` on class folders written here and on the shipped emoji."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("open_clip")
pytest.importorskip("timm")
pytest.importorskip("sklearn")

from PIL import Image

from limber_fast import cli
from limber_fast.data.emoji import TEST_STYLE, EmojiDataset, concepts
from limber_fast.demo import build_trainer, load_model
from limber_fast.evaluation.emoji import TestSet
from limber_fast.evaluation.ranking import top_k
from limber_fast.evaluation.zero_shot import class_features, image_features, name_prompts
from limber_fast.training.captions import TEMPLATES
from limber_fast.training.config import TrainConfig
from limber_fast.training.drawings import Drawings

COLOURS = {"dark_red": (150, 10, 10), "lime": (0, 255, 0), "navy": (0, 0, 128)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The demo's CLIP after 40 steps."""
    folder = tmp_path_factory.mktemp("demo")
    trainer = build_trainer(TrainConfig(concepts_per_batch=64, seed=1), Drawings.of(EmojiDataset()))
    for _ in range(40):
        trainer.train_step()
    trainer.save(folder)
    return folder / "checkpoint.pt"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """train and test, 10 and 6 noisy images of each colour; one broken image in each."""
    root = tmp_path_factory.mktemp("classes")
    random = np.random.default_rng(0)
    for part, count in (("train", 10), ("test", 6)):
        for name, colour in COLOURS.items():
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + random.normal(0, 40, (40, 40, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
        (root / part / "lime" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    return root


def evaluate(out, *arguments):
    code = cli.main(["--quiet", "evaluate", *map(str, arguments), "--output", str(out)])
    path = out / "evaluation.json"
    return code, json.loads(path.read_text()) if path.exists() else None


def test_zero_shot_is_clips_rule(checkpoint, folders, tmp_path):
    code, result = evaluate(tmp_path, "zero-shot", f"demo:{checkpoint}", "--images", folders / "test")
    assert code == 0 and len(result["entries"]) == 18 and len(result["skipped"]) == 1
    model, tokenizer = load_model(checkpoint)
    classes = []
    for name in ("dark red", "lime", "navy"):
        with torch.no_grad():
            rows = [model.encode_text(tokenizer([t.format(name)]))[0] for t in TEMPLATES]
        mean = torch.stack([row / row.norm() for row in rows]).mean(0)
        classes.append(mean / mean.norm())
    hits = []
    for entry in result["entries"]:
        pixels = torch.nn.functional.interpolate(
            torch.from_numpy(np.array(Image.open(folders / "test" / entry["id"]))).permute(2, 0, 1)[None] / 255,
            (32, 32), mode="area",
        )  # fmt: skip
        with torch.no_grad():
            scores = torch.stack(classes) @ model.encode_image(pixels)[0]
        guess = ["dark red", "lime", "navy"][int(scores.argmax())]
        assert entry["model"]["text"] == guess
        hits.append(guess.replace(" ", "_") == entry["id"].split("/")[0])
        assert entry["model"]["top-1"] == hits[-1] and entry["model"]["top-5"] == 1
    rows = result["groups"]["all"]["rows"]
    assert rows["model"]["top-1"]["mean"] == pytest.approx(100 * np.mean(hits))
    assert list(rows) == ["model", "prompt '{}' alone", "shuffled", "majority"]
    assert rows["majority"]["top-1"]["mean"] == pytest.approx(100 / 3)
    page = (tmp_path / "evaluation.html").read_text()
    assert page.count("data:image/jpeg") == 18 and "broken.jpg" in page and "dark red" in page


def test_zero_shot_on_the_shipped_emoji(checkpoint, tmp_path):
    code, result = evaluate(tmp_path, "zero-shot", f"demo:{checkpoint}", "--images", "emoji")
    test = EmojiDataset(TEST_STYLE, "all")
    assert code == 0 and len(result["entries"]) == len(test)
    held = sum(concepts()[int(i)].held_out for i in test.concept)
    assert result["groups"]["unseen"]["entries"] == held and result["groups"]["seen"]["entries"] == len(test) - held
    model, tokenizer = load_model(checkpoint)
    demo = TestSet.shipped()
    classes = class_features(model, tokenizer, [name_prompts(c) for c in demo.classes])
    scores = image_features(model, demo.test.images) @ classes
    for group, rows in (("seen", demo.seen), ("unseen", demo.unseen)):
        found, expected = result["groups"][group]["rows"]["model"], top_k(scores[rows], demo.labels[rows])
        for k in (1, 5):  # batches of another size may turn a tie
            assert found[f"top-{k}"]["mean"] == pytest.approx(expected[f"top{k}"], abs=250 / held)


def test_linear_probe_learns_from_random_features(folders, tmp_path):
    arguments = ("linear-probe", "timm:test_resnet", "--weights", "random", "--train", folders / "train")
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"dark_red": "wine", "lime": "lime", "navy": "sea"}))
    code, result = evaluate(tmp_path / "a", *arguments, "--images", folders / "test", "--names", names)
    rows = result["groups"]["all"]["rows"]
    assert code == 0 and rows["model"]["top-1"]["mean"] > 90 and len(result["skipped"]) == 2
    assert rows["shuffled"]["top-1"]["mean"] < 70 and {e["model"]["text"] for e in result["entries"]} <= {
        "wine", "lime", "sea"
    }  # fmt: skip
    code, other = evaluate(tmp_path / "b", *arguments, "--images", folders / "test", "--validation", folders / "test")
    assert code == 0 and other["groups"]["all"]["rows"]["model"]["top-1"]["mean"] > 90


def test_a_probe_of_two_classes_and_one_it_never_saw(folders, tmp_path):
    from limber_fast.data.classes import read_class_folder

    (tmp_path / "train" / "navy").mkdir(parents=True)
    for name in ("lime", "dark_red"):
        (tmp_path / "train" / name).symlink_to(folders / "train" / name)
    with pytest.raises(ValueError, match="no images; they have to lie"):
        read_class_folder(tmp_path / "train" / "navy")
    code, result = evaluate(
        tmp_path / "out", "linear-probe", "timm:test_resnet", "--weights", "random", "--train", tmp_path / "train",
        "--images", folders / "test",
    )  # fmt: skip
    by_class = {name: [e["model"]["top-1"] for e in result["entries"] if e["id"].startswith(name)] for name in COLOURS}
    assert code == 0 and sum(by_class["navy"]) == 0 and sum(by_class["lime"]) + sum(by_class["dark_red"]) >= 10


def test_linear_probe_on_the_shipped_emoji(checkpoint, tmp_path):
    code, result = evaluate(tmp_path, "linear-probe", f"demo:{checkpoint}", "--train", "emoji", "--images", "emoji")
    rows = result["groups"]["all"]["rows"]
    assert code == 0 and rows["model"]["top-1"]["mean"] > rows["majority"]["top-1"]["mean"] + 10
    assert {e["model"]["text"] for e in result["entries"]} <= {c.group for c in concepts()}


def test_open_clips_models_and_prompt_sets(folders, tmp_path):
    name = "open_clip:ViT-S-32-alt"
    (tmp_path / "prompts.txt").write_text("a {}\n\nthe {} thing\n")
    code, result = evaluate(tmp_path / "out", "zero-shot", name, "--weights", "random", "--images", folders / "test",
                            "--templates", tmp_path / "prompts.txt")  # fmt: skip
    assert code == 0 and "prompt 'a {}' alone" in result["groups"]["all"]["rows"]
    from limber_fast.evaluate_images import _templates
    from limber_fast.evaluation.towers import towers

    assert len(_templates("", towers(name, None))) == 80 and len(_templates("simple", None)) == 7


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(("zero-shot", "timm:test_resnet", "--weights", "random"), "no text tower"),
     (("zero-shot", "vit"), "model must be open_clip:MODEL"),
     (("linear-probe", "timm:no_such", "--train", "TRAIN"), "list_models"),
     (("linear-probe", "timm:test_resnet", "--train", "emoji"), "both be emoji"),
     (("zero-shot", "timm:test_resnet", "--names", "NAMES"), "no 'lime'"),
     (("linear-probe", "timm:test_resnet", "--weights", "random", "--train", "FEW"), "not among the 2 classes"),
     (("zero-shot", "open_clip:ViT-S-32-alt", "--weights", "TEXT"), "text.safetensors: the file must be a state dict"),
     (("zero-shot", "open_clip:ViT-S-32-alt", "--weights", "OTHER"), "other.pt: the file must hold 'text_projection'"),
     (("linear-probe", "timm:test_resnet", "--weights", "OTHER", "--train", "TRAIN"), "other.pt: the file must hold")],
)  # fmt: skip
def test_bad_calls_are_one_line(folders, tmp_path, capsys, arguments, says):
    (tmp_path / "names.json").write_text('{"dark_red": "x"}')
    for name in ("lime", "navy"):
        (tmp_path / "few" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "few" / name / "a.png")
    places = {"TRAIN": folders / "train", "NAMES": tmp_path / "names.json", "FEW": tmp_path / "few",
              "TEXT": tmp_path / "text.safetensors", "OTHER": tmp_path / "other.pt"}  # fmt: skip
    places["TEXT"].write_text("no weights\n")
    torch.save({"positional_embedding": torch.zeros(77, 256)}, places["OTHER"])
    code, result = evaluate(tmp_path / "out", *(places.get(x, x) for x in arguments), "--images", folders / "test")
    error = capsys.readouterr().err
    assert (code, result, error.count("\n")) == (1, None, 1) and says in error
