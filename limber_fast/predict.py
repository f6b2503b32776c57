"""`limber-fast predict`: what a Limber says of images, in files that `limber-fast evaluate` scores; and controls."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from limber_fast import GPTJ, GPTJConfig, Limber, checks, files
from limber_fast.console import Console
from limber_fast.data.captions import read_coco_captions, read_nocaps
from limber_fast.data.index import BrokenIndex
from limber_fast.data.pictures import Skipped
from limber_fast.data.questions import COCO_FILE, read_vqa
from limber_fast.devices import device_of
from limber_fast.evaluation.controls import majority_answer, shuffled_images, text_oracle_prompts
from limber_fast.models.encoders import encoder as make_encoder
from limber_fast.models.encoders import weights_of
from limber_fast.models.gptj_attention import Prefix
from limber_fast.models.gptj_files import read_config
from limber_fast.models.limber import DECODING
from limber_fast.models.tokenizer import pretrained_tokenizer

FAILED = 1
_OP = "predict"
_KEYS = {"caption": ("image_id", "caption"), "vqa": ("question_id", "answer")}
_ROOM = 512  # tokens behind the shots: a picture, its question and answer


def main(args: argparse.Namespace, console: Console) -> int | None:
    """Writes args.output, whole or not at all; images that cannot be read have no entry and are named."""
    skipped = Skipped()
    try:
        device = device_of(_OP, args.device)
        if args.output.is_dir():
            raise checks.invalid(_OP, "--output", "be a file", f"the folder {args.output}")
        args.output.parent.mkdir(parents=True, exist_ok=True)
        records, shots = _records(args), list(_shots(args, skipped))
        if not records:
            raise BrokenIndex("no images are named")
        told = _told(args, [*records, *(shot for _, shot, _ in shots)])
        if args.control == "shuffled":
            readable = [record for _, record in skipped.open(records)]
            others = shuffled_images([record.image for record in readable], args.seed)
            records = [dataclasses.replace(x, image=image) for x, image in zip(readable, others, strict=True)]
        limber = load(args, device)
        with _prefix(limber, shots, told, max(32, args.batch_size) * _ROOM) if shots else nullcontext() as prefix:
            said = list(_said(limber, records, told, prefix, args, skipped, console))
    except ValueError as error:  # a broken index, or files that do not fit each other
        console.error(str(error))
        return FAILED
    skipped.images = list({image.name: image for image in skipped.images}.values())  # asked about more than once
    if len(skipped):
        console.print(str(skipped))
    if not said:
        console.error(f"none of {len(records)} images could be read")
        return FAILED
    files.replace(args.output, json.dumps(said, ensure_ascii=False, indent=1) + "\n")
    console.print(f"wrote {args.output}: {len(said)} of {len(records)}")
    return None


def load(args: argparse.Namespace, device: torch.device) -> Limber:
    """Of a folder of `Limber.save_pretrained`, of LiMBeR's proj.ckpt and the name of its encoder, or of MAGMA's
    checkpoint."""
    if not (path := args.magma or args.limber).exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if args.magma:
        return _magma(args, device)
    if not args.language_model:
        raise checks.invalid(_OP, "--language-model", "be given with --limber", "nothing")
    if not (args.encoder or args.limber.is_dir()):
        raise checks.invalid(_OP, "--encoder", "be given with a file of P and b alone", "nothing", "as --encoder clip")
    model = GPTJ.from_pretrained(args.language_model, compute=args.compute, device=device)
    tokenizer = pretrained_tokenizer(_OP, args.tokenizer or args.language_model)
    weights = weights_of(args.encoder_weights)
    encoder = make_encoder(args.encoder, weights=weights, seed=args.seed) if args.encoder else "saved"
    if args.limber.is_file():
        return Limber(encoder, model, tokenizer).load_projection(args.limber).eval().to(device)
    limber = Limber.from_pretrained(args.limber, model, tokenizer, encoder)
    if limber.encoder is None:
        raise checks.invalid(_OP, "--encoder", "be given with a map that was saved without one", "nothing")
    return limber.eval().to(device)


def _magma(args: argparse.Namespace, device: torch.device) -> Limber:
    """Of GPT-J-6B's sizes where no language model's config.json says others, with adapters of MAGMA's quarter of its
    width."""
    if not (args.tokenizer or args.language_model):
        raise checks.invalid(_OP, "--tokenizer", "be given with --magma", "nothing", "a folder of GPT-2's")
    if args.encoder_weights:
        contract = "be left out with --magma, whose file has them"
        raise checks.invalid(_OP, "--encoder-weights", contract, repr(args.encoder_weights))
    config = GPTJConfig()
    if folder := args.language_model:
        config = GPTJConfig.from_dict(read_config(Path(folder)), str(Path(folder) / "config.json"))
    if config.adapter_width is None:
        config = dataclasses.replace(config, adapter_width=config.n_embd // 4)
    tokenizer = pretrained_tokenizer(_OP, args.tokenizer or args.language_model)
    encoder = make_encoder(args.encoder, weights=None) if args.encoder else None
    how = {"compute": args.compute} if args.compute else {}
    return Limber.from_magma(args.magma, tokenizer, encoder=encoder, config=config, device=device, **how).eval()


def _records(args: argparse.Namespace) -> list[Any]:
    if args.task == "vqa":
        return read_vqa(args.questions, None, args.images, file_name=args.file_name or COCO_FILE)
    return list((read_nocaps if args.nocaps else read_coco_captions)(args.references, args.images))


def _told(args: argparse.Namespace, records: Sequence[Any]) -> dict[int | str, str]:
    """What an annotator said of each image, first of all, in the place of the image: the text oracle."""
    given = getattr(args, "captions", [])
    if (args.control == "oracle") != bool(given):
        raise checks.invalid(_OP, "--control oracle", "come with --captions, and those with it", "one of them")
    found: dict[int | str, str] = {}
    for record in (record for path in given for record in read_coco_captions(path, args.images)):
        if record.image_id in found:
            raise BrokenIndex(f"{', '.join(map(str, given))}: image {record.image_id!r} comes twice")
        if text := next((one for one in (" ".join(x.split()) for x in record.captions) if one), ""):
            found[record.image_id] = text
    if not given:
        return found
    if missing := [record.image_id for record in records if record.image_id not in found]:
        contract = f"no caption of image {missing[0]!r}, which is asked about"
        raise BrokenIndex(f"{', '.join(map(str, given))}: {contract}")
    return found


def _shots(args: argparse.Namespace, skipped: Skipped) -> Iterator[tuple[Image.Image, Any, str]]:
    """Random questions with the answer that most annotators gave."""
    if not getattr(args, "shots", 0):
        return
    given = (args.shot_questions, args.shot_annotations, args.shot_images)
    if not all(given):
        contract = "come with --shot-questions, --shot-annotations and --shot-images"
        raise checks.invalid(_OP, "--shots", contract, f"{sum(map(bool, given))} of them")
    known = read_vqa(*given, file_name=args.file_name or COCO_FILE)
    order = np.random.default_rng(args.seed).permutation(len(known))
    found = skipped.open(known[i] for i in order)
    for shown in range(args.shots):
        image, shot = next(found, (None, None))
        if shot is None:
            raise BrokenIndex(f"{args.shot_questions}: {args.shots} shots asked for, {shown} can be shown")
        yield image, shot, majority_answer(shot.answers)


def _prefix(
    limber: Limber, shots: Sequence[tuple[Image.Image, Any, str]], told: dict[int | str, str], room: int
) -> Prefix:
    if not told:
        return limber.prefix([(image, shot.question, answer) for image, shot, answer in shots], room=room)
    prompts = text_oracle_prompts([told[x.image_id] for _, x, _ in shots], [x.question for _, x, _ in shots])
    answered = [f"{prompt} {answer}\n" for prompt, (_, _, answer) in zip(prompts, shots, strict=True)]
    return limber.language_model.prefix(limber.token_ids(answered, 0), room=room)


def _said(
    limber: Limber, records: Sequence[Any], told: dict[int | str, str], prefix: Prefix | None, args: argparse.Namespace,
    skipped: Skipped, console: Console,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    (key, value), count = _KEYS[args.task], 0
    how = {name: getattr(args, name) for name in ("decoding", "max_new_tokens", "batch_size")}
    with console.progress("predicting", len(records)) as update:
        for start in range(0, len(records), args.batch_size):
            some = records[start : start + args.batch_size]
            if opened := list(skipped.open(some)):
                images, asked = map(list, zip(*opened, strict=True))
                if args.control == "blind":
                    images = [Image.new("RGB", image.size) for image in images]
                how["seed"] = args.seed + count  # every text draws as it would in one call
                if told:
                    texts = _oracle(limber, [told[x.image_id] for x in asked], [x.question for x in asked], prefix, how)
                elif args.task == "vqa":
                    texts = limber.answer(images, [one.question for one in asked], prefix=prefix, **how)
                else:
                    texts = limber.caption(images, args.prompt, **how)
                count += len(texts)
                yield from ({key: getattr(x, key), value: text} for x, text in zip(asked, texts, strict=True))
            update(start + len(some))


def _oracle(
    limber: Limber, descriptions: Sequence[str], questions: Sequence[str], prefix: Prefix | None, how: dict[str, Any]
) -> list[str]:
    """The language model's answers alone, as `Limber.answer` would ask for them."""
    prompts = [limber.token_ids([text], 0) for text in text_oracle_prompts(descriptions, questions)]
    said = limber.language_model.generate(
        prompts, tokenizer=limber.tokenizer, prefix=prefix, stop_strings="\n", seed=how["seed"],
        max_new_tokens=how["max_new_tokens"], **DECODING[how["decoding"]],
    )  # fmt: skip
    return [text.strip() for text in said.texts]
