"""Questions about images: VQAv2's questions and annotations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from limber_fast import checks
from limber_fast.data.captions import existing_folder
from limber_fast.data.index import Index

COCO_FILE = "COCO_{subset}_{image_id:012d}.jpg"


@dataclass(frozen=True)
class Question:
    """A question, where its image lies, and what the annotators answered.

    Attributes:
        answers: one per annotator, ten in VQAv2; none without annotations.
        question_type, answer_type: VQAv2's ("what color is the", "other"), "" without annotations.
    """

    question_id: int
    image_id: int
    image: Path
    question: str
    answers: tuple[str, ...] = ()
    question_type: str = ""
    answer_type: str = ""


def read_vqa(
    questions: str | Path, annotations: str | Path | None, images: str | Path, *, file_name: str = COCO_FILE
) -> list[Question]:
    """The questions in their order, each with its annotation.

    Args:
        questions: `v2_OpenEnded_mscoco_val2014_questions.json` and the like.
        annotations: `v2_mscoco_val2014_annotations.json`; None for a test split.
        images: the folder of the files.
        file_name: their name; `{subset}` is the questions' `data_subtype`, "val2014".
    Raises: BrokenIndex with file and line; OSError where a file or the folder is missing.
    """
    try:
        file_name.format(subset="", image_id=1)
    except (LookupError, ValueError, AttributeError, MemoryError, OverflowError) as error:
        contract = "be a pattern of {subset} and {image_id}, as " + COCO_FILE
        raise checks.invalid("read_vqa", "file_name", contract, f"{file_name!r} ({error})") from None
    file, folder = Index(questions), existing_folder(images)
    subset = file.field(file.content, "data_subtype", str) if "{subset}" in file_name else ""
    answered = {} if annotations is None else _annotations(Index(annotations))
    found = {}
    for row, entry in enumerate(file.entries("questions")):
        name, image_id = (file.field(entry, key, int, key="questions", row=row) for key in ("question_id", "image_id"))
        if name in found:
            raise file.broken(f"a second question with id {name}", "questions", row)
        if annotations is not None and name not in answered:
            raise file.broken(f"question {name} has no annotation in {annotations}", "questions", row)
        about, *answer = answered.get(name, (image_id,))
        if about != image_id:
            raise file.broken(
                f"question {name} is about image {image_id}, its annotation about {about}", "questions", row
            )
        image = file.inside(folder, file_name.format(subset=subset, image_id=image_id), "questions", row)
        text = file.field(entry, "question", str, key="questions", row=row)
        found[name] = Question(name, image_id, image, text, *answer)
    return list(found.values())


def _annotations(file: Index) -> dict[int, tuple]:
    """By question: image, answers, question type, answer type."""
    found = {}
    for row, entry in enumerate(file.entries("annotations")):
        place = {"key": "annotations", "row": row}
        answers = []
        for given in file.field(entry, "answers", list, **place):
            if not (isinstance(given, dict) and isinstance(given.get("answer"), str)):
                raise file.broken("'answers' must hold objects with an 'answer', a string", "annotations", row)
            answers.append(given["answer"])
        if not answers:
            raise file.broken("'answers' must not be empty", "annotations", row)
        kinds = (file.field(entry, name, str, **place) for name in ("question_type", "answer_type"))
        name, image_id = (file.field(entry, key, int, **place) for key in ("question_id", "image_id"))
        found[name] = (image_id, tuple(answers), *kinds)
    return found
