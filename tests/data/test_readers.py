"""Readers of COCO, NoCaps, VQAv2 and LiMBeR's folders, on indices and image files written here."""

import json

import pytest

from limber_fast.data.captions import read_coco_captions, read_limber_folder, read_nocaps
from limber_fast.data.index import BrokenIndex, Index
from limber_fast.data.questions import read_vqa

COCO = {
    "info": {"description": 'a "quoted" , : { [ description', "year": 2014},
    "licenses": [],
    "images": [{"id": 9, "file_name": "nine.jpg", "width": 4}, {"id": 4, "file_name": "deep/four.jpg"}],
    "annotations": [
        {"id": 1, "image_id": 4, "caption": "A cat."},
        {"id": 2, "image_id": 9, "caption": "Two\ndogs"},
        {"id": 3, "image_id": 4, "caption": "the café"},
    ],
}


def written(path, content):
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def line_of(path, text, nth=0):
    lines = path.read_text(encoding="utf-8").split("\n")
    return [number for number, line in enumerate(lines, 1) if text in line][nth]


def test_coco(tmp_path):
    found = read_coco_captions(written(tmp_path / "captions.json", COCO), tmp_path)
    assert [(r.image_id, r.image, r.captions, r.domain) for r in found] == [
        (9, tmp_path / "nine.jpg", ("Two\ndogs",), ""),
        (4, tmp_path / "deep" / "four.jpg", ("A cat.", "the café"), ""),
    ]
    without = {key: value for key, value in COCO.items() if key != "annotations"}
    assert [r.captions for r in read_coco_captions(written(tmp_path / "test.json", without), tmp_path)] == [(), ()]


def test_nocaps(tmp_path):
    nocaps = json.loads(json.dumps(COCO))
    nocaps["images"][0]["domain"], nocaps["images"][1]["domain"] = "out-domain", "in-domain"
    found = read_nocaps(written(tmp_path / "nocaps.json", nocaps), tmp_path)
    assert [r.domain for r in found] == ["out-domain", "in-domain"]
    path = written(tmp_path / "captions.json", COCO)
    with pytest.raises(BrokenIndex, match=rf"captions.json, images\[0\], line {line_of(path, '{', 3)}: no 'domain'"):
        read_nocaps(path, tmp_path)


def change(*path, value):
    def apply(content):
        for step in path[:-1]:
            content = content[step]
        content[path[-1]] = value

    return apply


@pytest.mark.parametrize(
    ("edit", "place", "at", "message"),
    [
        (change("images", 1, "id", value=9), "images[1]", '"id": 9', "a second image with id 9"),
        (change("images", 1, "file_name", value="../x.jpg"), "images[1]", '"id": 4', "'../x.jpg' leads out of"),
        (change("images", 1, "file_name", value="/x.jpg"), "images[1]", '"id": 4', "'/x.jpg' leads out of"),
        (
            change("images", 1, "file_name", value=7),
            "images[1]",
            '"id": 4',
            "'file_name' must be a string; found a whole number",
        ),
        (change("annotations", 2, "image_id", value=5), "annotations[2]", '"id": 3', "no image has id 5"),
        (
            change("annotations", 2, "caption", value=None),
            "annotations[2]",
            '"id": 3',
            "'caption' must be a string; found null",
        ),
        (change("annotations", 0, value={"id": 1}), "annotations[0]", '"id": 1', "no 'image_id'"),
    ],
)
def test_a_broken_entry_is_named_with_its_line(tmp_path, edit, place, at, message):
    content = json.loads(json.dumps(COCO))
    edit(content)
    path = written(tmp_path / "captions.json", content)
    line = line_of(path, at, -1) - 1  # the entry starts on the line of its brace
    with pytest.raises(BrokenIndex) as caught:
        read_coco_captions(path, tmp_path)
    assert str(caught.value).startswith(f"{path}, {place}, line {line}: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [\n{"id": 1,}\n]}', "line 2: not JSON: "),
        ("[]", "line 1: expected an object; found a list"),
        ("", "line 1: not JSON"),
        ('\n{"annotations": []}', "line 2: no 'images'"),
        ('{"images": {}}', "line 1: 'images' must be a list; found an object"),
        ('{"images": [\n3]}', "images[0], line 2: expected an object; found a whole number"),
        ('{"images": [\n\n{"id": true}]}', "images[0], line 3: 'id' must be a whole number or a string; found bool"),
    ],
)
def test_what_is_no_index(tmp_path, text, message):
    path = tmp_path / "captions.json"
    path.write_text(text)
    with pytest.raises(BrokenIndex) as caught:
        read_coco_captions(path, tmp_path)
    assert str(caught.value).startswith(f"{path}, {message}")


def test_files_that_are_missing_or_not_text(tmp_path):
    (tmp_path / "binary.json").write_bytes(b'{\n"images": "\xff"}')
    with pytest.raises(BrokenIndex, match=r"binary\.json, line 2: not UTF-8"):
        Index(tmp_path / "binary.json")
    with pytest.raises(FileNotFoundError):
        Index(tmp_path / "none.json")
    path = tmp_path / "list.json"
    path.write_text('[{"a": 1},\n\n{"a": "x"}, 5]')
    with pytest.raises(BrokenIndex, match=r"list\.json, \[2\], line 3: expected an object; found a whole number"):
        Index(path, list).entries()
    with pytest.raises(NotADirectoryError, match="nowhere: no such folder"):
        read_coco_captions(written(tmp_path / "captions.json", COCO), tmp_path / "nowhere")


VQA = {
    "data_subtype": "val2014",
    "questions": [
        {"question_id": 10, "image_id": 7, "question": "What is it?"},
        {"question_id": 12, "image_id": 7, "question": "How many?"},
    ],
}
ANSWERS = {
    "annotations": [
        {"question_id": q, "image_id": 7, "question_type": kind, "answer_type": "other", "multiple_choice_answer": "x",
         "answers": [{"answer": word, "answer_id": i, "answer_confidence": "yes"} for i, word in enumerate(words)]}
        for q, kind, words in ((12, "how many", ["2", "two"]), (10, "what is", ["dog", "a dog"]))
    ]
}  # fmt: skip


def test_vqa(tmp_path):
    questions, answers = written(tmp_path / "q.json", VQA), written(tmp_path / "a.json", ANSWERS)
    first, second = read_vqa(questions, answers, tmp_path)
    assert (first.question_id, first.question, first.answers) == (10, "What is it?", ("dog", "a dog"))
    assert (second.question_id, second.answers, second.question_type) == (12, ("2", "two"), "how many")
    assert first.image == second.image == tmp_path / "COCO_val2014_000000000007.jpg"
    test, _ = read_vqa(questions, None, tmp_path, file_name="{image_id}.png")
    assert (test.answers, test.answer_type, test.image.name) == ((), "", "7.png")


def test_vqa_that_does_not_fit_together(tmp_path):
    questions = written(tmp_path / "q.json", VQA)
    first_alone = {"annotations": ANSWERS["annotations"][1:]}
    with pytest.raises(
        BrokenIndex, match=r"q\.json, questions\[1\], line 9: question 12 has no annotation in .*a\.json"
    ):
        read_vqa(questions, written(tmp_path / "a.json", first_alone), tmp_path)
    other = json.loads(json.dumps(ANSWERS))
    other["annotations"][0]["image_id"] = 8
    with pytest.raises(
        BrokenIndex, match=r"q\.json, questions\[1\], line 9: question 12 is about image 7, its annotation about 8"
    ):
        read_vqa(questions, written(tmp_path / "a.json", other), tmp_path)
    other["annotations"][1]["answers"][1] = "dog"
    with pytest.raises(
        BrokenIndex, match=r"a\.json, annotations\[1\], line \d+: 'answers' must hold objects with an 'answer'"
    ):
        read_vqa(questions, written(tmp_path / "a.json", other), tmp_path)


def test_limber_folder(tmp_path):
    for number, names in ((0, ("b", "a")), (1, ("c",))):
        (tmp_path / "image_data" / str(number)).mkdir(parents=True)
        for name in names:
            record = {"image_path": f"images/{number}/{name}.jpg", "captions": [f"one {name}", name], "metadata": {}}
            written(tmp_path / "image_data" / str(number) / f"{name}.json", record)
    found = list(read_limber_folder(tmp_path))
    assert [r.image_id for r in found] == ["0/a", "0/b", "1/c"]
    assert found[2].image == tmp_path / "images" / "1" / "c.jpg" and found[2].captions == ("one c", "c")
    written(tmp_path / "image_data" / "1" / "c.json", {"image_path": "images/1/c.jpg", "captions": []})
    with pytest.raises(BrokenIndex, match=r"c\.json, line 1: 'captions' must not be empty"):
        list(read_limber_folder(tmp_path))
    with pytest.raises(NotADirectoryError, match="image_data: no such folder"):
        list(read_limber_folder(tmp_path / "image_data"))
