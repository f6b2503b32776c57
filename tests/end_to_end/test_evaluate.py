"""`limber-fast evaluate` on files as COCO, NoCaps and VQAv2 have them, with images written here."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from caption_cases import captions

Image = pytest.importorskip("PIL.Image")

from limber_fast import cli  # noqa: E402
from limber_fast.evaluation.bootstrap import bootstrap_interval  # noqa: E402
from limber_fast.evaluation.cider import DocumentFrequency, cider_d  # noqa: E402
from limber_fast.evaluation.vqa import vqa_accuracy  # noqa: E402

IMAGES = 12
DOMAINS = ("in-domain", "near-domain", "out-domain")
KINDS = ("other", "number")


@pytest.fixture
def coco(tmp_path):
    """A small COCO with domains; image 3 is broken, image 5 missing. The model copies a third of its captions."""
    texts = captions(6 * IMAGES, seed=1)
    references = [texts[IMAGES + 5 * i : IMAGES + 5 * i + 5] for i in range(IMAGES)]
    found = [references[i][i % 5] if i % 3 == 0 else texts[i] for i in range(IMAGES)]
    entries = []
    for i in range(IMAGES):
        entries.append({"id": 100 + i, "file_name": f"{i}.png", "domain": DOMAINS[i % 3]})
        pixels = np.random.default_rng(i).integers(0, 256, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:200])
    (tmp_path / "5.png").unlink()
    annotations = [{"image_id": 100 + i, "caption": text} for i, row in enumerate(references) for text in row]
    write(tmp_path / "references.json", {"images": entries, "annotations": annotations})
    write(tmp_path / "model.json", [{"image_id": 100 + i, "caption": text} for i, text in enumerate(found)])
    write(tmp_path / "blind.json", [{"image_id": 100 + i, "caption": "a man"} for i in range(IMAGES)])
    return tmp_path, found, references


def write(path, content):
    path.write_text(json.dumps(content, indent=1))


def evaluate(folder, *arguments):
    """Exit code and the result, if there is one."""
    code = cli.main(["evaluate", *map(str, arguments), "--images", str(folder), "--output", str(folder / "out")])
    path = folder / "out" / "evaluation.json"
    return code, json.loads(path.read_text()) if path.exists() else None


def test_captions(coco, capsys):
    folder, found, references = coco
    code, result = evaluate(
        folder, "caption", folder / "model.json", "--references", folder / "references.json", "--nocaps",
        "--against", f"blind={folder / 'blind.json'}",
    )  # fmt: skip
    assert code == 0
    rows = result["groups"]["all"]["rows"]
    assert list(rows) == ["model", "blind", "shuffled", "majority", "best reference"]
    scores = 100 * cider_d(found, references)
    interval = bootstrap_interval(scores)
    assert rows["model"]["CIDEr-D"] == pytest.approx(interval._asdict())
    blind = 100 * cider_d(["a man"] * IMAGES, references)
    difference = bootstrap_interval(scores - blind)
    assert rows["blind"]["CIDEr-D"]["model_minus_this"] == pytest.approx(difference._asdict(), abs=1e-9)
    assert rows["model"]["exact match"]["mean"] == pytest.approx(100 / 3)
    assert (
        rows["shuffled"]["CIDEr-D"]["mean"]
        < rows["model"]["CIDEr-D"]["mean"]
        < rows["best reference"]["CIDEr-D"]["mean"]
    )
    assert [entry["model"]["CIDEr-D"] for entry in result["entries"]] == pytest.approx((scores / 100).tolist())
    constants = [cider_d([text] * IMAGES, references).mean() for texts in references for text in texts]
    assert rows["majority"]["CIDEr-D"]["mean"] == pytest.approx(100 * max(constants))
    assert len({entry["majority"]["text"] for entry in result["entries"]}) == 1

    near = result["groups"]["near-domain"]
    alone = cider_d(found[1::3], references[1::3])
    assert near["entries"] == 4 and near["rows"]["model"]["CIDEr-D"]["mean"] == pytest.approx(100 * alone.mean())

    page = (folder / "out" / "evaluation.html").read_text()
    assert page.count("data:image/jpeg") == IMAGES - 2 and "no such file" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    for text in (found[0], references[1][2]):
        assert text.replace("&", "&amp;").replace('"', "&quot;").replace("'", "&#x27;") in page
    assert f"{interval.mean:.1f} ({interval.low:.1f}, {interval.high:.1f})" in capsys.readouterr().out


def test_what_is_not_scored_is_said(coco, capsys):
    folder, found, references = coco
    arguments = ("caption", folder / "model.json", "--references", folder / "references.json")
    some = [{"image_id": 100 + i, "caption": found[i]} for i in (0, 2, 5)]
    write(folder / "model.json", some)
    assert evaluate(folder, *arguments) == (1, None)
    assert "no caption for 9 of 12, the first is image_id 101" in capsys.readouterr().err
    code, result = evaluate(folder, *arguments, "--subset")
    frequency = DocumentFrequency.of(references)
    scores = cider_d([found[i] for i in (0, 2, 5)], [references[i] for i in (0, 2, 5)], document_frequency=frequency)
    assert code == 0 and result["groups"]["all"]["rows"]["model"]["CIDEr-D"]["mean"] == pytest.approx(
        100 * scores.mean()
    )

    write(folder / "blind.json", some[:2])
    capsys.readouterr()
    assert evaluate(folder, *arguments, "--subset", "--against", f"blind={folder / 'blind.json'}")[0] == 1
    assert capsys.readouterr().err.count("\n") == 1
    for wrong, message in (
        ([{"image_id": 7, "caption": "x"}], r"model\.json, \[0\], line 2: no references for image_id 7"),
        ([some[0], some[0]], r"model\.json, \[1\], line 6: a second caption for image_id 100"),
        ([{"image_id": 100}], r"model\.json, \[0\], line 2: no 'caption'"),
    ):
        write(folder / "model.json", wrong)
        assert evaluate(folder, *arguments, "--subset")[0] == 1
        assert re.search(message, capsys.readouterr().err)


def test_clip_score_leaves_broken_images_out(coco, monkeypatch, capsys):
    pytest.importorskip("open_clip")
    import torch
    from open_clip.model import CLIP

    folder, found, _ = coco
    torch.manual_seed(0)
    vision = dict(image_size=32, patch_size=8, layers=1, width=32, head_width=16)
    model = CLIP(16, vision, dict(context_length=12, vocab_size=300, width=16, heads=2, layers=1))

    def preprocess(image):
        return torch.from_numpy(np.array(image.resize((32, 32)))).permute(2, 0, 1) / 255

    def tokenize(texts):
        rows = [list(text.encode())[16:27] for text in texts]
        return torch.tensor([[1, *row, *[0] * (11 - len(row))] for row in rows])

    model.eval()
    monkeypatch.setattr("limber_fast.models.encoders.open_clip_model", lambda *names: (model, preprocess))
    monkeypatch.setattr("open_clip.get_tokenizer", lambda name: tokenize)
    code, result = evaluate(
        folder, "caption", folder / "model.json", "--references", folder / "references.json", "--clip", "tiny:weights",
        "--device", "cpu",
    )
    assert code == 0
    kept = [i for i in range(IMAGES) if i not in (3, 5)]
    assert [entry["id"] for entry in result["entries"]] == [100 + i for i in kept]
    assert [skipped["image"] for skipped in result["skipped"]] == [str(folder / "3.png"), str(folder / "5.png")]
    assert "2 broken images skipped" in capsys.readouterr().out
    with torch.no_grad():
        image = model.encode_image(
            torch.stack([preprocess(Image.open(folder / f"{i}.png")) for i in kept]), normalize=True
        )
        text = model.encode_text(tokenize([f"A photo depicts {found[i]}" for i in kept]), normalize=True)
    expected = 2.5 * (image * text).sum(1).clamp(min=0)
    assert [entry["model"]["CLIPScore"] for entry in result["entries"]] == pytest.approx(expected.tolist(), abs=1e-5)
    assert all(0 <= entry["model"]["RefCLIPScore"] <= 2 for entry in result["entries"])


@pytest.mark.parametrize(
    ("scorer", "message"),
    [("ViT-B-99:openai", "name must be a model of open_clip.list_models(); got 'ViT-B-99'"),
     ("ViT-B-32:nosuch", "weights must be a file or one of openai, ")],
)  # fmt: skip
def test_an_unknown_scorer_is_one_line(coco, capsys, scorer, message):
    pytest.importorskip("open_clip")
    folder = coco[0]
    references = ("--references", folder / "references.json")
    assert evaluate(folder, "caption", folder / "model.json", *references, "--clip", scorer) == (1, None)
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_device_that_is_not_there_is_one_line(coco, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    arguments = (coco[0] / "model.json", "--references", coco[0] / "references.json", "--clip", "tiny:weights")
    assert evaluate(coco[0], "caption", *arguments, "--device", "cuda") == (1, None)
    message = "evaluate: --device must be one that torch sees; got 'cuda' without a GPU; use --device cpu"
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_library_that_cannot_download_is_one_line(coco, capsys, monkeypatch):
    open_clip = pytest.importorskip("open_clip")

    def create_model(*args, **kwargs):
        raise RuntimeError("Failed to download weights for tag 'openai': no network\nand more")

    monkeypatch.setattr(open_clip, "create_model", create_model)
    folder = coco[0]
    arguments = (folder / "model.json", "--references", folder / "references.json", "--clip", "ViT-B-32:openai")
    assert evaluate(folder, "caption", *arguments) == (1, None)
    said = capsys.readouterr().err
    assert "open_clip:ViT-B-32: its weights are not here and did not arrive: Failed to download" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("name", ["shuffled", "majority", "best reference", "model"])
def test_no_row_takes_a_control_s_name(coco, capsys, name):
    folder = coco[0]
    against = ("--references", folder / "references.json", "--against", f"{name}={folder / 'blind.json'}")
    assert evaluate(folder, "caption", folder / "model.json", *against) == (1, None)
    assert "from 'model', 'shuffled', 'majority', 'best reference'; got" in capsys.readouterr().err


@pytest.fixture
def vqa(tmp_path):
    chosen = np.random.default_rng(0)
    words = ["red", "Blue", "two dogs", "a cat", "yes"]
    answers = [[words[j] for j in chosen.integers(0, 5, 10)] for _ in range(30)]
    questions = [{"question_id": i, "image_id": i // 3, "question": f"What {i}?"} for i in range(30)]
    annotations = [
        {"question_id": i, "image_id": i // 3, "question_type": f"what {i % 2}", "answer_type": KINDS[i % 2],
         "answers": [{"answer": answer, "answer_id": k} for k, answer in enumerate(answers[i])]}
        for i in range(30)
    ]  # fmt: skip
    for i in range(10):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(tmp_path / f"COCO_test_{i:012d}.jpg")
    write(tmp_path / "questions.json", {"data_subtype": "test", "questions": questions})
    write(tmp_path / "annotations.json", {"annotations": annotations})
    found = [f" {row[0]} and so on" for row in answers]
    write(tmp_path / "model.json", [{"question_id": i, "answer": text} for i, text in enumerate(found)])
    return tmp_path, found, answers


def test_vqa(vqa, capsys):
    folder, found, answers = vqa
    arguments = ("vqa", folder / "model.json", "--questions", folder / "questions.json",
                 "--annotations", folder / "annotations.json")  # fmt: skip
    code, result = evaluate(folder, *arguments)
    assert code == 0 and list(result["groups"]) == ["number", "other", "all"]
    rows = result["groups"]["all"]["rows"]
    cut = [" ".join(text.split()[: max(len(a.split()) for a in row)]) for text, row in zip(found, answers, strict=True)]
    scores = 100 * vqa_accuracy(cut, answers)
    expected = bootstrap_interval(scores, images=[i // 3 for i in range(30)])
    assert rows["model"]["VQA accuracy"] == pytest.approx(expected._asdict())
    assert rows["model"]["min(n/3, 1)"]["mean"] == pytest.approx(
        100 * vqa_accuracy(cut, answers, variant="simple").mean()
    )
    assert result["groups"]["all"]["images"] == 10
    assert rows["majority by question type"]["VQA accuracy"]["mean"] >= rows["majority"]["VQA accuracy"]["mean"] > 0
    whole = evaluate(folder, *arguments, "--whole-answers")[1]
    assert whole["groups"]["all"]["rows"]["model"]["VQA accuracy"]["mean"] == 0 < scores.mean()
    assert whole["entries"][0]["model"]["text"] == found[0]
    assert "What 4?" in (folder / "out" / "evaluation.html").read_text()
    capsys.readouterr()
    assert evaluate(folder, *arguments, "--against", f"model={folder / 'model.json'}")[0] == 1
    assert "--against needs names that differ" in capsys.readouterr().err
    for pattern in ("{foo}.jpg", "{image_id:x", "{0}.jpg", "{image_id:q}"):
        assert evaluate(folder, *arguments, "--file-name", pattern)[0] == 1
        assert "file_name must be a pattern of {subset} and {image_id}, as COCO_" in capsys.readouterr().err
    (folder / "model.json").write_text("[" * 100_000)
    assert evaluate(folder, *arguments)[0] == 1
    assert "model.json, line 1: " in capsys.readouterr().err


def test_from_a_shell(coco):
    folder, _, _ = coco
    command = (sys.executable, "-m", "limber_fast", "--quiet", "evaluate", "caption", str(folder / "model.json"))
    done = subprocess.run(
        [*command, "--references", "nowhere.json", "--images", str(folder)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1) and "nowhere.json" in done.stderr
    done = subprocess.run([*command, "--images", str(folder)], capture_output=True, text=True)
    assert done.returncode == 2 and "--references" in done.stderr
