"""`limber-fast evaluate`: files of predictions, or image models, against the truth, as JSON and one page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from limber_fast.console import Console
from limber_fast.data.captions import CaptionedImage, read_coco_captions, read_nocaps
from limber_fast.data.index import BrokenIndex
from limber_fast.data.pictures import Broken, Skipped, open_image
from limber_fast.data.questions import COCO_FILE, read_vqa
from limber_fast.devices import device_of
from limber_fast.evaluation.clip_score import score_captions
from limber_fast.evaluation.predictions import (
    CONTROLS,
    MODEL,
    Scored,
    read_predictions,
    score_caption_files,
    score_vqa_files,
)
from limber_fast.optional import needed
from limber_fast.report.evaluation import Shown, table_of, write_page, write_result

FAILED = 1


def main(args: argparse.Namespace, console: Console) -> int | None:
    """Runs one task and returns the exit code."""
    taken, names = (MODEL, *CONTROLS.get(args.task, ())), [name for name, _ in getattr(args, "against", ())]
    if len({*taken, *names}) < len(taken) + len(names):
        own = ", ".join(map(repr, taken))
        console.error(f"--against needs names that differ from each other and from {own}; got {names}")
        return FAILED
    skipped = Skipped()
    try:
        scored, shown = _TASKS[args.task](args, skipped, console)
    except ValueError as error:  # a broken index, or a name that is no model's
        console.error(str(error))
        return FAILED
    args.output.mkdir(parents=True, exist_ok=True)
    result = write_result(args.output / "evaluation.json", scored, args, skipped)
    write_page(args.output / "evaluation.html", scored, result, shown, args, skipped)
    for group in result["groups"]:
        console.table(f"{group}, {result['groups'][group]['entries']} entries", *table_of(result, group))
    if len(skipped):
        console.print(str(skipped))
    console.print(f"wrote {args.output / 'evaluation.json'} and {args.output / 'evaluation.html'}")
    return None


def _predictions(args: argparse.Namespace, key: str, value: str, ids: Sequence) -> dict[str, dict]:
    """By row; what the model is asked for, all rows must have."""
    found = {MODEL: read_predictions(args.predictions, key, value, ids, subset=args.subset)}
    for name, path in args.against:
        row = read_predictions(path, key, value, ids, subset=args.subset)
        missing = [entry for entry in found[MODEL] if entry not in row]
        if missing:
            raise BrokenIndex(f"{path}: no {value} for {key} {missing[0]!r}, which {args.predictions} has one for")
        found[name] = row
    return found


def _captions(args: argparse.Namespace, skipped: Skipped, console: Console) -> tuple[Scored, list[Shown]]:
    read = read_nocaps if args.nocaps else read_coco_captions
    records = [record for record in read(args.references, args.images) if record.captions]
    if not records:
        raise BrokenIndex(f"{args.references}: no captions to compare with")
    predictions = _predictions(args, "image_id", "caption", [record.image_id for record in records])
    clip = None
    device = device_of("evaluate", args.device) if args.clip is not None else None  # before images are opened
    if args.clip is not None:
        # An image that cannot be opened has no CLIPScore, and leaves every column: all are means over the same images.
        for record in records:
            if record.image_id in predictions[MODEL] and isinstance(found := open_image(record.image), Broken):
                skipped.images.append(found)
                del predictions[MODEL][record.image_id]
        if not predictions[MODEL]:
            raise BrokenIndex(str(skipped))
        clip = _scorer(args.clip, device)
    scored = score_caption_files(records, predictions, clip=clip, seed=args.seed)
    by_id = {record.image_id: record for record in records}
    shown = [
        Shown(by_id[name].image, str(name), [("reference", text) for text in by_id[name].captions])
        for name in scored.ids
    ]
    return scored, shown


def _answers(args: argparse.Namespace, skipped: Skipped, console: Console) -> tuple[Scored, list[Shown]]:
    questions = read_vqa(args.questions, args.annotations, args.images, file_name=args.file_name or COCO_FILE)
    if not questions:
        raise BrokenIndex(f"{args.questions}: no questions")
    predictions = _predictions(args, "question_id", "answer", [question.question_id for question in questions])
    scored = score_vqa_files(questions, predictions, truncate=not args.whole_answers)
    by_id = {question.question_id: question for question in questions}
    shown = [
        Shown(by_id[name].image, by_id[name].question, [("annotators", ", ".join(by_id[name].answers))])
        for name in scored.ids
    ]
    return scored, shown


def _scorer(name: str, device: torch.device):
    """CLIPScore and RefCLIPScore by an open_clip model, weights as open_clip names them or a file."""
    open_clip = needed("open_clip", "evaluate --clip")
    from limber_fast.models.encoders import open_clip_model

    model_name, _, weights = name.partition(":")
    model, preprocess = open_clip_model(f"open_clip:{model_name}", model_name, weights)
    model.to(device)
    tokenize = open_clip.get_tokenizer(model_name)

    def score(records: Sequence[CaptionedImage], captions: list[str]) -> dict:
        images = (open_image(record.image) for record in records)
        references = [record.captions for record in records]
        found = score_captions(model, images, captions, references, preprocess=preprocess, tokenize=tokenize)
        return {"CLIPScore": found.clip_score, "RefCLIPScore": found.ref_clip_score}

    return score


def _zero_shot(args: argparse.Namespace, skipped: Skipped, console: Console) -> tuple[Scored, list[Shown]]:
    from limber_fast.evaluate_images import zero_shot

    return zero_shot(args, skipped, console)


def _linear_probe(args: argparse.Namespace, skipped: Skipped, console: Console) -> tuple[Scored, list[Shown]]:
    from limber_fast.evaluate_images import linear_probe

    return linear_probe(args, skipped, console)


_TASKS = {"caption": _captions, "vqa": _answers, "zero-shot": _zero_shot, "linear-probe": _linear_probe}
