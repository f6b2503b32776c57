"""`limber-fast predict`: what a Limber says of images, in files that `limber-fast evaluate` scores; and controls."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from limber_fast import GPTJ, Limber, checks, files
from limber_fast.console import Console
from limber_fast.data.captions import read_coco_captions, read_nocaps
from limber_fast.data.index import BrokenIndex
from limber_fast.data.pictures import Skipped
from limber_fast.data.questions import COCO_FILE, read_vqa
from limber_fast.evaluation.controls import majority_answer, shuffled_images
from limber_fast.models.encoders import encoder as make_encoder
from limber_fast.models.tokenizer import pretrained_tokenizer

FAILED = 1
Say = Callable[[list[Image.Image], list[Any]], list[str]]


def main(args: argparse.Namespace, console: Console) -> int | None:
    """Writes args.output, whole or not at all; images that cannot be read have no entry and are named."""
    skipped = Skipped()
    try:
        limber = load(args)
        records, key, value, say = _TASKS[args.task](args, limber, skipped)
        said = list(_said(records, key, value, say, args, skipped, console))
    except ValueError as error:  # a broken index, or files that do not fit each other
        console.error(str(error))
        return FAILED
    skipped.images = list({image.name: image for image in skipped.images}.values())  # asked about more than once
    if len(skipped):
        console.print(str(skipped))
    if not said:
        console.error(f"none of {len(records)} images could be read")
        return FAILED
    args.output.parent.mkdir(parents=True, exist_ok=True)
    files.replace(args.output, json.dumps(said, ensure_ascii=False, indent=1) + "\n")
    console.print(f"wrote {args.output}: {len(said)} of {len(records)}")
    return None


def load(args: argparse.Namespace) -> Limber:
    """Of a folder of `Limber.save_pretrained`, or of LiMBeR's proj.ckpt and the name of its encoder."""
    op = "predict"
    model = GPTJ.from_pretrained(args.language_model, **({"compute": args.compute} if args.compute else {}))
    tokenizer = pretrained_tokenizer(op, args.tokenizer or args.language_model)
    weights = {"": True, "random": None}.get(args.encoder_weights, args.encoder_weights)
    encoder = make_encoder(args.encoder, weights=weights, seed=args.seed) if args.encoder else "saved"
    if args.limber.is_dir():
        limber = Limber.from_pretrained(args.limber, model, tokenizer, encoder)
        if limber.encoder is None:
            raise checks.invalid(op, "--encoder", "be given with a map that was saved without one", "nothing")
        return limber.eval()
    if encoder == "saved":
        raise checks.invalid(op, "--encoder", "be given with a file of P and b alone", "nothing", "as --encoder clip")
    return Limber(encoder, model, tokenizer).load_projection(args.limber).eval()


def _captions(args: argparse.Namespace, limber: Limber, skipped: Skipped) -> tuple[list, str, str, Say]:
    records = (read_nocaps if args.nocaps else read_coco_captions)(args.references, args.images)

    def say(images: list[Image.Image], _: list[Any]) -> list[str]:
        return limber.caption(images, args.prompt, **_how(args))

    return list(records), "image_id", "caption", say


def _answers(args: argparse.Namespace, limber: Limber, skipped: Skipped) -> tuple[list, str, str, Say]:
    records = read_vqa(args.questions, None, args.images, file_name=args.file_name or COCO_FILE)
    shots = list(_shots(args, skipped)) if args.shots else []

    def say(images: list[Image.Image], asked: list[Any]) -> list[str]:
        return limber.answer(images, [one.question for one in asked], shots, **_how(args))

    return records, "question_id", "answer", say


def _shots(args: argparse.Namespace, skipped: Skipped) -> Iterator[tuple[Image.Image, str, str]]:
    """Random questions with the answer that most annotators gave."""
    given = (args.shot_questions, args.shot_annotations, args.shot_images)
    if not all(given):
        contract = "come with --shot-questions, --shot-annotations and --shot-images"
        raise checks.invalid("predict", "--shots", contract, f"{sum(map(bool, given))} of them")
    known = read_vqa(*given, file_name=args.file_name or COCO_FILE)
    order = np.random.default_rng(args.seed).permutation(len(known))
    found = skipped.open(known[i] for i in order)
    for _ in range(args.shots):
        try:
            image, shot = next(found)
        except StopIteration:
            raise BrokenIndex(f"{args.shot_questions}: {args.shots} shots asked for, {len(known)} questions") from None
        yield image, shot.question, majority_answer(shot.answers)


def _how(args: argparse.Namespace) -> dict[str, Any]:
    return {"decoding": args.decoding, "max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size,
            "seed": args.seed}  # fmt: skip


def _said(
    records: Sequence[Any], key: str, value: str, say: Say, args: argparse.Namespace, skipped: Skipped, console: Console
) -> Iterator[dict[str, Any]]:
    if args.control == "shuffled":
        others = shuffled_images([record.image for record in records], args.seed)
        records = [dataclasses.replace(record, image=image) for record, image in zip(records, others, strict=True)]
    with console.progress("predicting", max(1, len(records))) as update:
        for start in range(0, len(records), args.batch_size):
            some = records[start : start + args.batch_size]
            if opened := list(skipped.open(some)):
                images, asked = map(list, zip(*opened, strict=True))
                if args.control == "blind":
                    images = [Image.new("RGB", image.size) for image in images]
                for record, text in zip(asked, say(images, asked), strict=True):
                    yield {key: getattr(record, key), value: text}
            update(start + len(some))


_TASKS = {"caption": _captions, "vqa": _answers}
